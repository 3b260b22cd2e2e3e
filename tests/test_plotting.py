"""What a figure shows is what it was given: read back from the drawn objects."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb, to_rgba
from scipy.integrate import trapezoid

from robustood import metrics
from robustood.detectors import MSP
from robustood.evaluate import Report, epsilon_curve, four_sides
from robustood.metrics import Estimate, proportion
from robustood.plotting import (
    COLOURS,
    STYLE,
    band,
    fall,
    image_grid,
    roc,
    score_histograms,
    use_style,
)

OKABE_ITO = {
    "blue": (0, 114, 178),
    "orange": (230, 159, 0),
    "green": (0, 158, 115),
    "red": (213, 94, 0),
    "purple": (204, 121, 167),
    "sky": (86, 180, 233),
    "yellow": (240, 228, 66),
    "black": (0, 0, 0),
}


@pytest.fixture(autouse=True)
def _clean():
    with plt.rc_context():
        yield
    plt.close("all")


# ---- the style --------------------------------------------------------------------------------


def test_the_colours_are_those_of_okabe_and_ito():
    for name, rgb in OKABE_ITO.items():
        assert tuple(round(255 * part) for part in to_rgb(COLOURS[name])) == rgb, name
    grey = to_rgb(COLOURS["grey"])
    assert grey[0] == grey[1] == grey[2]
    assert set(COLOURS) == {*OKABE_ITO, "grey"}


def test_the_style_draws_on_white_in_the_palette_and_without_yellow():
    use_style()
    figure, axis = plt.subplots()
    lines = [axis.plot([0, 1], [i, i])[0] for i in range(6)]
    colours = [to_hex(line.get_color()).upper() for line in lines]
    assert len(set(colours)) == 6
    assert set(colours) <= set(COLOURS.values()) - {COLOURS["yellow"]}  # faint on white
    assert figure.get_facecolor() == to_rgba("white")
    assert axis.get_facecolor() == to_rgba("white")
    assert not axis.spines["top"].get_visible() and not axis.spines["right"].get_visible()
    for key in STYLE:
        wanted = STYLE[key]
        assert plt.rcParams[key] == (list(wanted) if isinstance(wanted, tuple) else wanted), key


# ---- the grid of images -----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "columns", "rows"), [(5, 3, 2), (3, 3, 1), (1, 4, 1), (9, 2, 5)])
def test_each_image_has_its_place_and_what_is_left_stays_empty(n, columns, rows):
    images = torch.rand(n, 1, 4, 6, generator=torch.Generator().manual_seed(n))
    figure = image_grid(images, [f"image {i}" for i in range(n)], columns=columns)
    assert len(figure.axes) == rows * columns
    for place, axis in enumerate(figure.axes):
        assert not axis.axison
        if place >= n:
            assert not axis.images and axis.get_title() == ""
            continue
        (shown,) = axis.images
        assert np.array_equal(shown.get_array(), images[place, 0].numpy())
        assert shown.get_clim() == (0, 1)  # a dim image stays dim
        assert axis.get_title() == f"image {place}"
        spec = axis.get_subplotspec()
        assert (spec.rowspan.start, spec.colspan.start) == divmod(place, columns)


def test_colour_images_keep_their_channels():
    images = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    figure = image_grid(images, columns=2)
    for place, axis in enumerate(figure.axes):
        assert np.array_equal(axis.images[0].get_array(), images[place].permute(1, 2, 0).numpy())
        assert axis.get_title() == ""


def test_scale_is_the_width_of_one_image_in_inches():
    images = torch.zeros(6, 1, 2, 2)
    width, height = image_grid(images, columns=3, scale=0.5).get_size_inches()
    assert width == pytest.approx(1.5)
    assert image_grid(images, columns=3, scale=1.0).get_size_inches()[0] == pytest.approx(3)
    titled = image_grid(images, ["t"] * 6, columns=3, scale=0.5).get_size_inches()
    assert titled[1] > height and titled[0] == width


def test_images_that_carry_a_gradient_are_shown_and_kept():
    images = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    before = images.detach().clone()
    image_grid(images)
    assert images.requires_grad and torch.equal(images.detach(), before)


# ---- the band ---------------------------------------------------------------------------------


def test_the_band_goes_from_low_to_high_and_the_line_through_the_values():
    estimates = [proportion(k, 20) for k in (3, 11, 20)]
    x = [0.0, 0.1, 0.3]
    _, axis = plt.subplots()
    band(axis, x, estimates, label="robust", colour="green")
    (line,), (area,) = axis.lines, axis.collections
    assert np.array_equal(line.get_xdata(), x)
    assert np.array_equal(line.get_ydata(), [e.value for e in estimates])
    corners = {(float(a), float(b)) for a, b in area.get_paths()[0].vertices}
    ends = {(a, end) for a, e in zip(x, estimates) for end in (e.low, e.high)}
    assert corners == ends and len(ends) == 6
    assert to_hex(line.get_color()).upper() == COLOURS["green"]
    assert to_hex(area.get_facecolor()[0]).upper() == COLOURS["green"]
    assert 0 < area.get_facecolor()[0][3] < 0.5  # what lies behind can be seen
    assert axis.get_legend_handles_labels()[1] == ["robust"]


def test_a_line_can_differ_by_more_than_its_colour():
    _, axis = plt.subplots()
    estimates = [Estimate(0.5, 0.4, 0.6, 10)] * 2
    band(axis, [0, 1], estimates)
    band(axis, [0, 1], estimates, colour="red", marker="s", linestyle="--", linewidth=3)
    first, second = axis.lines
    assert (first.get_marker(), first.get_linestyle()) == ("o", "-")
    assert (second.get_marker(), second.get_linestyle()) == ("s", "--")
    assert second.get_linewidth() == 3
    assert to_hex(first.get_color()).upper() == COLOURS["blue"]


def test_nothing_is_shown_or_closed_behind_the_readers_back(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *a, **k: pytest.fail("plt.show was called"))
    figure = image_grid(torch.zeros(1, 1, 2, 2))
    band(figure.axes[0], [0], [proportion(1, 2)])
    assert plt.fignum_exists(figure.number)


# ---- what an attack does to a detector --------------------------------------------------------


@pytest.fixture(scope="module")
def sides(net, book):
    x_in, x_out = book.test.x[:60], {k: v[:50] for k, v in book.ood.items()}
    return four_sides(MSP(net), x_in, x_out, 0.05, steps=3, targets=1)


@pytest.fixture(scope="module")
def rows(net, book):
    letters = book.ood["letters"][:20]
    return epsilon_curve(MSP(net), book.test.x[:20], letters, 0.1, [0.0, 0.05], steps=2, targets=1)


@pytest.fixture
def axis():
    return plt.subplots()[1]


def scored(seed, n=40, m=30):
    rng = np.random.default_rng(seed)
    return rng.normal(1, 1, n).round(1), rng.normal(0, 1, m).round(1)  # with ties


def test_the_area_under_each_curve_is_the_auroc_and_its_mark_the_row_of_the_report(axis, sides):
    shown = {"clean": sides["none"], "in": sides["in"], "out": sides["out"], "both": sides["both"]}
    said = roc(axis, shown, "letters")
    curves = [line for line in axis.lines if line.get_marker() != "None"]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in curves}
    assert len(curves) == len(looks) == 4  # colour, dashes and mark all differ
    for line, (name, report) in zip(curves, shown.items(), strict=True):
        row, x, y = report["letters"], *line.get_data()
        assert trapezoid(y, x) == pytest.approx(float(row["auroc"]), abs=1e-12)
        assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
        (at,) = line.get_markevery()
        assert x[at] == pytest.approx(row["fpr"].value, abs=1e-12)
        assert y[at] == pytest.approx(1 - row["rejected"].value, abs=1e-12)
        assert line.get_label() == f"{name}: AUROC {float(row['auroc']):.3f}"
        accepted = f"{100 * row['fpr'].value:.3g} % of letters"
        assert line.get_label() in said and accepted in said
    assert y[at] < 0.95 <= curves[0].get_ydata()[curves[0].get_markevery()[0]]
    assert axis.get_xlabel() == "letters accepted (FPR)"
    assert "95 % TPR" in axis.get_legend().get_title().get_text()


@pytest.mark.parametrize("tpr", [0.5, 0.8, 0.95, 1.0])
def test_arrays_are_drawn_as_a_report_with_these_scores(tpr):
    (clean, out), (came, up) = scored(0), scored(1)
    report = Report({}, [], {"in (clean)": clean, "in": came, "out": up})
    lines = []
    for measured, more in (
        (report, {}),
        ({"": report}, {}),
        ((came, up), {"clean": clean}),
        ((list(came), torch.tensor(up)), {"clean": torch.tensor(clean)}),
    ):
        axis = plt.subplots()[1]
        said = roc(axis, measured, tpr=tpr, **more)
        lines.append(
            (axis.lines[2].get_xydata().tolist(), axis.lines[2].get_markevery(), said.count(":"))
        )
        assert axis.lines[2].get_label() == f"AUROC {metrics.auroc(came, up):.3f}"
    assert all(line == lines[0] for line in lines)
    x, y = np.array(lines[0][0])[lines[0][1][0]]
    assert (x, y) == pytest.approx(
        (np.mean(up >= (t := metrics.threshold_at_tpr(clean, tpr))), np.mean(came >= t))
    )
    own = plt.subplots()[1]
    roc(own, (clean, out), tpr=tpr)  # a pair alone sets its own threshold
    (at,) = own.lines[2].get_markevery()
    assert own.lines[2].get_ydata()[at] >= tpr
    assert own.lines[2].get_xdata()[at] == pytest.approx(
        metrics.fpr_at_tpr(clean, out, tpr, positive="in")
    )


def test_the_histograms_count_every_score_and_the_line_is_the_threshold(axis, sides):
    said = score_histograms(axis, {"clean": sides["none"], "attacked": sides["both"]}, "noise")
    clean, came = sides["none"].scores, sides["both"].scores
    wanted = [clean["in"], clean["noise"], came["in"], came["noise"]]
    names = [
        "in-distribution, clean",
        "noise, clean",
        "in-distribution, attacked",
        "noise, attacked",
    ]
    assert len(axis.patches) == 4 and len({tuple(p.get_data().edges) for p in axis.patches}) == 1
    for patch, scores, name in zip(axis.patches, wanted, names, strict=True):
        values, edges, _ = patch.get_data()
        assert np.array_equal(values, np.histogram(scores, edges)[0]) and len(values) == 40
        assert values.sum() == len(scores) and patch.get_label() == name
        assert edges[0] <= scores.min() and scores.max() <= edges[-1]
        assert patch.get_fill() == ("attacked" in name)
        colour = COLOURS["blue" if "distribution" in name else "red"]
        assert to_hex(patch.get_edgecolor()).upper() == colour
        assert f"{name}: median {np.median(scores):.3g}" in said
    threshold = metrics.threshold_at_tpr(clean["in"])
    assert np.array_equal(axis.lines[0].get_xdata(), [threshold] * 2)
    assert f"cut at {threshold:.3g}" in said
    assert f"{100 * (1 - sides['both']['noise']['rejected'].value):.3g} % of in-dist" in said
    assert "higher: more in-distribution" in axis.get_xlabel() and axis.get_ylabel() == "inputs"


@pytest.mark.parametrize("bins", [7, [-0.5, 0.25, 0.5], np.linspace(-9, 9, 5)])
def test_scores_beyond_the_edges_are_counted_in_the_last_bins(axis, bins):
    a, b = scored(2)
    score_histograms(axis, (a, b), "letters", bins=bins, tpr=0.8)
    assert [patch.get_label() for patch in axis.patches] == ["in-distribution", "letters"]
    assert all(patch.get_fill() and patch.get_linewidth() > 0 for patch in axis.patches)
    for patch, scores in zip(axis.patches, (a, b), strict=True):
        values, edges, _ = patch.get_data()
        assert values.sum() == len(scores)
        assert values[0] == np.sum(scores < edges[1]) and values[-1] == np.sum(scores >= edges[-2])
    assert axis.lines[0].get_xdata()[0] == metrics.threshold_at_tpr(a, 0.8)
    assert axis.get_legend_handles_labels()[1][-1] == "threshold (80 % TPR)"


@pytest.mark.parametrize("column", ["auroc", "fpr", "fpr_attacked", "rejected"])
def test_the_fall_goes_through_the_rows_with_their_intervals(axis, rows, column):
    kept = [{k: vars(v) if isinstance(v, Estimate) else v for k, v in row.items()} for row in rows]
    said = fall(axis, {"MSP": rows, "from JSON": kept}, column)
    areas = axis.collections
    for line, area in zip(axis.lines[:2], areas, strict=True):
        assert np.array_equal(line.get_xdata(), [0.0, 0.05])
        assert np.array_equal(line.get_ydata(), [float(row[column]) for row in rows])
        corners = {(float(x), float(y)) for x, y in area.get_paths()[0].vertices}
        ends = {(row["eps"], end) for row in rows for end in (row[column].low, row[column].high)}
        assert corners == ends
    assert len(axis.lines) == (3 if column == "auroc" else 2)  # the AUROC of a coin
    assert axis.get_legend_handles_labels()[1] == ["MSP", "from JSON"]
    assert "pixel units" in axis.get_xlabel() and axis.get_ylabel() in said
    assert (
        f"MSP: {rows[0][column]:.2f} at radius 0 and {rows[1][column]:.2f} at radius 0.05" in said
    )


def test_a_single_fall_needs_no_name(axis, rows):
    said = fall(axis, rows)
    assert axis.get_legend() is None and axis.lines[0].get_label().startswith("_")
    assert said.startswith("AUROC against the radius of the attack. 0.")


def test_two_pairs_are_cut_by_the_threshold_of_the_first(axis):
    (clean, out), (came, up) = scored(0), scored(1)
    said = score_histograms(axis, {"clean": (clean, out), "attacked": (came, up)}, tpr=0.75)
    threshold = metrics.threshold_at_tpr(clean, 0.75)
    assert axis.lines[0].get_xdata()[0] == threshold
    assert f"accepts {100 * np.mean(came >= threshold):.3g} % of in-distribution" in said
    outline, filled = axis.patches[1], axis.patches[3]
    assert (outline.get_fill(), outline.get_hatch()) == (False, None)
    assert (filled.get_fill(), filled.get_hatch()) == (True, "//")  # without colour, too
    own = plt.subplots()[1]
    score_histograms(own, {"clean": (clean, out), "attacked": (came, up)}, clean=came)
    assert own.lines[0].get_xdata()[0] == metrics.threshold_at_tpr(came)


WRONG = [
    ({}, "measured must hold 1 to"),
    ({"a": 3}, r"measured\['a'\] must be a report or a pair"),
    ({3: ([1], [0])}, "measured: each name must be a str"),
    (([1.0], [0.0], [2.0]), "measured must be a report or a pair"),
    (([1.0], []), "measured: scores_out must be finite numbers, at least one"),
    (([[1.0]], [0.0]), "measured: scores_in must have 1 axes"),
    ({"a": ([1.0], [np.nan])}, r"measured\['a'\]: scores_out must be finite"),
    ({str(i): ([1.0], [0.0]) for i in range(7)}, "measured must hold 1 to . by name, got 7"),
    (Report({}, []), "measured has no scores of both sides; draw a report as measured"),
    (Report({}, [], {"out": np.ones(2)}), "measured has no scores of both sides"),
]


@pytest.mark.parametrize("draw", [roc, score_histograms])
@pytest.mark.parametrize(("measured", "said"), WRONG)
def test_what_cannot_be_drawn_is_refused(untyped, axis, draw, measured, said):
    with pytest.raises(ValueError, match=said):
        draw(axis, measured)
    assert not axis.lines and not axis.patches


def test_an_unknown_set_a_kept_report_and_a_wrong_row_are_refused(untyped, axis, sides, rows):
    for outliers in ("lettres", None):
        with pytest.raises(ValueError, match=r"outliers must be one of 'letters', .*, got"):
            roc(axis, sides["none"], outliers)
    kept = Report.from_json(sides["none"].to_json(scores=False))
    with pytest.raises(ValueError, match=r"no scores of both sides; .*scores=True"):
        score_histograms(axis, kept, "letters")
    for bins in (0, [1.0], [1.0, 1.0], [2, 1], True, "auto", None):
        with pytest.raises(ValueError, match=r"^bins must be"):
            score_histograms(axis, ([1.0], [0.0]), bins=bins)
    with pytest.raises(ValueError, match=r"column must be one of 'auroc', .*, got 'aurok'"):
        fall(axis, rows, "aurok")
    for bad, said in (
        ([], "rows must hold at least 1"),
        ({"a": []}, r"rows\['a'\] must hold at least 1"),
        ({"eps": 0.1}, r"rows\['eps'\] must be a list of rows"),
        ([3], "rows: each must be a dict"),
        ([{"eps": 0.1}], "rows: each must have 'auroc', .*, got eps"),
        ([{"eps": 0.1, "auroc": 0.5}], "rows: auroc must be a rate with its interval, got float"),
        ([{"eps": 0.1, "auroc": {"value": 1}}], "rows: auroc must be a rate with its interval"),
    ):
        with pytest.raises(ValueError, match=said):
            fall(axis, bad)
    for draw in (roc, score_histograms, fall):
        with pytest.raises(ValueError, match="axis must be Matplotlib's Axes"):
            draw(plt, rows)


def test_the_figures_can_be_saved_with_their_text(sides, rows, tmp_path):
    use_style()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    shown = {"clean": sides["none"], "attacked": sides["both"]}
    said = [
        roc(axes[0], shown, "letters"),
        score_histograms(axes[1], shown, "letters"),
        fall(axes[2], rows),
    ]
    assert all(text.endswith(".") and 60 < len(text) < 400 and "\n" not in text for text in said)
    figure.savefig(tmp_path / "figure.png", metadata={"Description": " ".join(said)})
    assert (tmp_path / "figure.png").stat().st_size > 20_000


def test_scores_that_no_bins_can_part_are_refused():
    _, axis = plt.subplots()
    far = np.full(4, 1e17)
    with pytest.raises(
        ValueError, match=r"scores in \[1e\+17, 1e\+17\] cannot be parted into \d+ bins"
    ):
        score_histograms(axis, (far, far))
