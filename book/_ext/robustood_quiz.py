"""The directive ``quiz``: a question whose answers unfold what speaks for or against them.

The title is the question. The body is a YAML list: each entry has an ``answer``, ``why`` it is right or wrong, and
``right: true`` for the one that is right. Markup and formulas work in all three. Each answer becomes a ``<details>``
element, so that the quiz needs no script and works by mouse, touch and keyboard.

    ```{quiz} Which of these numbers can an attack only lower?
    - answer: The robust accuracy.
      why: That is a property of the network.
    - answer: The accuracy that is left after an attack.
      right: true
      why: A stronger attack finds what a weaker one missed.
    ```
"""

from __future__ import annotations

from docutils import nodes
from docutils.nodes import Element, Node
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from yaml import YAMLError, safe_load

KEYS = {"answer", "why", "right"}
VERDICTS = {True: "Right.", False: "No."}


class Unfolding(Element, nodes.General):
    """An answer that unfolds; its first child is always visible."""


class Folded(Element, nodes.General):
    """The visible part of an answer."""


class Quiz(SphinxDirective):
    """A question with answers, each with an explanation."""

    required_arguments = 1
    final_argument_whitespace = True
    has_content = True

    def run(self) -> list[Node]:
        box = nodes.container(classes=["quiz"])
        box += self.parsed(self.arguments[0], "quiz-question")
        for entry in self.entries():
            right = entry.get("right", False)
            unfolding = Unfolding(classes=["right" if right else "wrong"])
            unfolding += Folded("", *self.parsed(entry["answer"])[0].children)
            unfolding += self.parsed(f"**{VERDICTS[right]}** {entry['why']}", "quiz-why")
            box += unfolding
        return [box]

    def entries(self) -> list[dict]:
        """The answers.

        Raises:
            an error of the build, for a body of another form, or with none or several right answers.
        """
        try:
            found = safe_load("\n".join(self.content))
        except YAMLError as error:
            raise self.error(f"quiz: the body is not YAML: {error}") from error
        listed = isinstance(found, list) and len(found) > 1
        if not listed or not all(isinstance(each, dict) and set(each) <= KEYS for each in found):
            raise self.error(
                "quiz: the body must be a list of entries with the keys answer, why, right"
            )
        for each in found:
            if not all(isinstance(each.get(key), str) for key in ("answer", "why")):
                raise self.error(
                    f"quiz: an entry needs the texts answer and why; quote them: {each}"
                )
        if sum(each.get("right") is True for each in found) != 1:
            raise self.error("quiz: exactly one answer must have right: true")
        return found

    def parsed(self, text: str, *classes: str) -> nodes.container:
        """A text with its markup."""
        found = nodes.container(classes=list(classes))
        self.state.nested_parse(StringList([text], self.get_source_info()[0]), 0, found)
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    tags = {Unfolding: "details", Folded: "summary"}
    for node, tag in tags.items():

        def enter(self, node, tag=tag) -> None:
            self.body.append(self.starttag(node, tag))

        def leave(self, node, tag=tag) -> None:
            self.body.append(f"</{tag}>\n")

        app.add_node(node, html=(enter, leave))
    app.add_directive("quiz", Quiz)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
