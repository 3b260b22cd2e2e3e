"""The quiz directive: each answer unfolds its reason, and a quiz that is not well formed stops the build."""

import io

import pytest
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

GOOD = """- answer: It is **.80**.
  why: "An attack bounds it: from above."
- answer: It is at most $0.8$.
  right: true
  why: A better attack may find more."""


@pytest.fixture
def built(tmp_path):
    """What a page with a quiz of this body looks like, and the warnings of its build."""

    def build(body: str) -> tuple[str, str]:
        source = tmp_path / "source"
        source.mkdir()
        (source / "conf.py").write_text(
            'extensions = ["myst_parser", "robustood_quiz"]\nmyst_enable_extensions = ["dollarmath"]\n'
            'project = "test"\n'
        )
        page = f"# Title\n\n```{{quiz}} What do you know of $r$?\n{body}\n```\n"
        (source / "index.md").write_text(page)
        told = io.StringIO()
        out, trees = tmp_path / "out", tmp_path / "trees"
        with docutils_namespace():
            Sphinx(source, source, out, trees, "html", status=None, warning=told).build()
        return (tmp_path / "out" / "index.html").read_text("utf-8"), told.getvalue()

    return build


def test_each_answer_unfolds_its_reason(built):
    page, warnings = built(GOOD)
    assert not warnings
    assert page.count("<details") == page.count("<summary") == 2
    wrong, right = page.split("<details")[1:]
    assert 'class="wrong"' in wrong and 'class="right"' in right
    assert "It is <strong>.80</strong>." in wrong.split("</summary>")[0]
    assert "<strong>No.</strong> An attack bounds it: from above." in wrong.split("</summary>")[1]
    assert "math" in right.split("</summary>")[0]
    assert "<strong>Right.</strong> A better attack" in right.split("</summary>")[1]
    assert "<script" not in page[page.index('class="quiz') : page.rindex("</details>")]


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("- answer: a", "list of entries"),
        (GOOD.replace("  right: true\n", ""), "exactly one answer"),
        (GOOD.replace("**.80**.", "**.80**.\n  right: true"), "exactly one answer"),
        (GOOD.replace("why: A", "because: A"), "keys answer, why, right"),
        (GOOD.replace("It is **.80**.", "0.8"), "quote them"),
        (GOOD.replace('"An', "An").replace('above."', "above."), "not YAML"),
    ],
)
def test_a_quiz_that_is_not_well_formed_is_an_error(built, body, fault):
    _, warnings = built(body)
    assert fault in warnings
