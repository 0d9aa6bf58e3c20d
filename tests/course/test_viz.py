"""Figures: what they hold, that their text is legible, and that their alt text reaches the notebook."""

import io
import math
import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from minblip2 import UserError, masks
from minblip2.course import figures, viz


def texts(figure):
    """Every piece of text in a figure."""
    found = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_visible() and text.get_text()]


def luminance(colour):
    """Relative luminance, 0 black to 1 white (WCAG 2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def picture(width=60, height=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def log(steps=50):
    return [{"step": step, "loss": 3.0 - step / 50, "itc": 1.0, "itm": 0.5 + 0.1 * (-1) ** step}
            for step in range(steps)]


def one_of_each():
    """One of each kind."""
    ones = torch.ones(1, 3, dtype=torch.bool)
    vectors = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    return {
        "masks": figures.mask_grid({"unimodal": masks.unimodal(4, ones)[0, 0]}, 4, ["[CLS]", "a", "cat"]),
        "maps": figures.attention_maps(picture(), {"query 1": torch.rand(4, 6)}, [(5, 5, 20, 20)]),
        "curves": figures.curves(log(), ["loss", "itm"], smooth=5, chance={"itm": 0.6365}),
        "captions": figures.caption_sheet([picture()], [["a cat that costs $5 or $6"]]),
        "gap": figures.modality_gap({"before": (vectors, vectors + 1), "after": (vectors, vectors)})}


# --- style and colours ---

def test_colours_differ_in_lightness_and_stand_off_the_paper():
    for one, other in ((viz.QUERY, viz.TEXT), (viz.QUERY, viz.IMAGE), (viz.TEXT, viz.IMAGE)):
        assert contrast(one, other) > 1.4  # still told apart when printed grey
    assert contrast(viz.INK, viz.PAPER) > 7 and contrast(viz.QUIET, viz.PAPER) > 7  # small letters (WCAG AAA)
    for colour in (viz.QUERY, viz.TEXT):
        assert contrast(colour, viz.FORBIDDEN) > 1.7
    assert luminance(viz.PAPER) > 0.9  # opaque light paper on any theme


def test_colours_survive_colour_blindness():
    deutan = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])  # Machado et al. 2009
    seen = [deutan @ to_rgb(colour) for colour in (viz.QUERY, viz.TEXT, viz.IMAGE, viz.FORBIDDEN)]
    for index, colour in enumerate(seen):
        for other in seen[:index]:
            assert np.linalg.norm(colour - other) > 0.25


def test_importing_sets_the_style_and_dollars_stay_dollars():
    assert matplotlib.rcParams["figure.facecolor"] == viz.PAPER
    assert len(set(viz.LINES)) == len(set(viz.DASHES)) == 6  # a line is told by its dash too
    assert any("$5 or $6" in text.replace("\n", " ") for text in texts(one_of_each()["captions"]))
    # would be a syntax error in mathematics
    viz.png(figures.caption_sheet([picture()], [["costs $\\frac{1$ dollars"]]))


@pytest.mark.parametrize("name", ["masks", "maps", "curves", "captions", "gap"])
def test_every_figure_is_small_legible_and_inside_its_paper(name):
    figure = one_of_each()[name]
    image = Image.open(io.BytesIO(viz.png(figure)))
    width, height = figure.get_size_inches()
    assert image.size == pytest.approx((144 * width, 144 * height), abs=1)
    assert width <= 9.4  # the width of a cell in JupyterLab
    assert len(viz.png(figure)) < 100_000
    drawn = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())  # in inches
    assert drawn.x0 > -0.02 and drawn.y0 > -0.02 and drawn.x1 < width + 0.02 and drawn.y1 < height + 0.02
    assert min(text.get_fontsize() for text in figure.findobj(matplotlib.text.Text) if text.get_text()) >= 9


def test_png_keeps_rare_colours():
    figure = figures.attention_maps(picture(), {"query": torch.rand(4, 6)})
    pixels = np.asarray(Image.open(io.BytesIO(viz.png(figure))).convert("RGB")).reshape(-1, 3).astype(int)
    marker = 255 * np.array(to_rgb(viz.WRONG))
    assert (np.abs(pixels - marker).max(axis=1) < 25).sum() > 20  # the cross at the maximum is still vermillion


def test_a_logarithmic_axis_shows_numbers():
    """Formulas are not set, so that a caption may cost $5; matplotlib's own labels of such an axis are formulas."""
    figure = matplotlib.figure.Figure()
    panel = figure.subplots()
    panel.loglog([0.2, 3000], [4, 5])
    viz.png(figure)
    assert {"1", "10", "100", "1000"} <= set(texts(figure)) and "$" not in "".join(texts(figure))


# --- show ---

def test_show_puts_the_alt_text_into_the_img(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: shown.append(bundle))
    figure = one_of_each()["gap"]
    assert viz.show(figure, 'Images left, texts right: a "gap" > 0.') is None
    bundle, = shown
    assert bundle["text/plain"] == 'Images left, texts right: a "gap" > 0.'
    assert 'alt="Images left, texts right: a &quot;gap&quot; &gt; 0."' in bundle["text/html"]
    assert f'width="{round(96 * figure.get_figwidth())}"' in bundle["text/html"]
    assert re.search(r'src="data:image/png;base64,iVBORw0KGgo', bundle["text/html"])  # a PNG's first bytes
    viz.show(figure, "the same", photographs=True)
    assert re.search(r'src="data:image/jpeg;base64,/9j/', shown[1]["text/html"])  # a JPEG's
    with pytest.raises(UserError, match="alt text"):
        viz.show(figure, "  ")


def test_figures_do_not_show_themselves_a_second_time():
    import matplotlib.pyplot

    one_of_each()
    assert matplotlib.pyplot.get_fignums() == []  # pyplot's figures would be displayed again, without alt text


# --- masks ---

def test_mask_grid_colours_what_may_be_seen():
    text_mask = torch.tensor([[True, True, False]])
    chosen = {"bidirectional": masks.bidirectional(2, text_mask)[0, 0],
              "causal": masks.causal(torch.ones(1, 5) > 0)[0, 0]}
    figure = figures.mask_grid(chosen, 2, ["a", "cat", "[PAD]"])
    assert len(figure.axes) == 2
    for panel, (name, mask) in zip(figure.axes, chosen.items(), strict=True):
        cells = panel.images[0].get_array()
        for row in range(5):
            for column in range(5):
                colour = (viz.QUERY if column < 2 else viz.TEXT) if mask[row, column] else viz.FORBIDDEN
                assert tuple(cells[row, column]) == pytest.approx(to_rgb(colour))
        assert panel.get_xlabel() == name
        assert [label.get_text() for label in panel.get_xticklabels()] == ["q1", "q2", "a", "cat", "[PAD]"]
    assert {"may see a query", "may see a text token", "forbidden"} <= set(texts(figure))


def test_mask_grid_names_groups_where_tokens_are_too_many():
    figure = figures.mask_grid({"causal": torch.ones(48, 48).tril() > 0}, 32)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["queries", "text"]


def test_mask_grid_refuses_what_does_not_fit():
    with pytest.raises(UserError, match=r"\(1, 1, 4, 4\)"):
        figures.mask_grid({"a": torch.ones(1, 1, 4, 4)}, 2)
    with pytest.raises(UserError, match="of one size"):
        figures.mask_grid({"a": torch.ones(4, 4), "b": torch.ones(5, 5)}, 2)
    with pytest.raises(UserError, match="3 text labels for 2 text tokens"):
        figures.mask_grid({"a": torch.ones(4, 4)}, 2, ["a", "b", "c"])
    with pytest.raises(UserError, match="square"):
        figures.mask_grid({}, 2)


# --- maps ---

def test_attention_maps_mark_the_maximum_in_its_patch():
    heatmap = torch.eye(4, 6, requires_grad=True) * torch.arange(4)[:, None]  # its peak is in row 3, column 3
    figure = figures.attention_maps(picture(60, 40), {"query 1": heatmap, "mean": torch.rand(4, 6)}, [(5, 6, 20, 10)])
    assert len(figure.axes) == 3
    x, y = figure.axes[1].lines[0].get_xydata()[0]
    assert 30 <= x + 0.5 < 40 and 30 <= y + 0.5 < 40  # patches are 10 pixels wide and high
    assert figure.axes[1].get_title(loc="left") == "query 1\nmaximum 3"
    for panel in figure.axes:
        assert panel.patches[0].get_bbox().bounds == pytest.approx((4.5, 5.5, 20, 10))  # pixel 5 begins at 4.5
        assert panel.get_xlim() == (-0.5, 59.5) and panel.get_ylim() == (39.5, -0.5)  # the map did not stretch the view


def test_long_titles_of_maps_stay_above_their_panels():
    words = "a grey background with a purple square at the top right"
    figure = figures.attention_maps(picture(), {words: torch.rand(4, 6), "other": torch.rand(4, 6)})
    figure.draw_without_rendering()
    first, second = figure.axes[1:3]
    text = next(text for text in first.findobj(Text) if words in text.get_text().replace("\n", " "))
    assert text.get_window_extent().x1 < second.get_window_extent().x0


def test_attention_maps_take_grey_pictures_and_refuse_stacks_of_maps():
    viz.png(figures.attention_maps(picture().convert("L"), {"query": torch.zeros(2, 2)}))
    with pytest.raises(UserError, match=r"\(12, 4, 6\)"):
        figures.attention_maps(picture(), {"heads": torch.rand(12, 4, 6)})


# --- curves ---

def test_curves_draw_each_run_and_the_chance_line():
    figure = figures.curves({"hard": log(), "random": log(20)}, ["loss", "itm"], chance={"itm": math.log(2)})
    loss, itm = figure.axes
    assert [len(line.get_xdata()) for line in loss.lines] == [50, 20]
    assert len({(line.get_color(), str(line.get_linestyle())) for line in loss.lines}) == 2
    assert itm.lines[-1].get_ydata() == [math.log(2)] * 2
    assert {"chance 0.693", "hard", "random", "loss", "ITM", "step", "nats"} <= set(texts(figure))


def test_curves_call_things_by_their_names_and_tell_what_is_measured():
    lines = [{"step": step, "itm_accuracy": 0.5, "rate_of_change": 1.0} for step in range(3)]
    accuracy, other = figures.curves(lines, ["itm_accuracy", "rate_of_change"]).axes
    assert (accuracy.get_title(loc="left"), accuracy.get_ylabel()) == ("ITM accuracy", "share right")
    assert (other.get_title(loc="left"), other.get_ylabel()) == ("rate of change", "")
    mine, = figures.curves(log(), {"loss": "loss per word"}, unit="bits").axes
    assert (mine.get_title(loc="left"), mine.get_ylabel()) == ("loss per word", "bits")


def test_the_label_of_the_chance_line_is_legible_where_a_curve_crosses_it():
    figure = figures.curves([{"step": step, "itm": 0.64} for step in range(5)], ["itm"], chance={"itm": 0.6365})
    label, = figure.axes[0].texts
    paper = label.get_bbox_patch()
    assert to_rgb(paper.get_facecolor()[:3]) == pytest.approx(to_rgb(viz.PAPER)) and paper.get_alpha() >= 0.8
    assert label.get_zorder() > max(line.get_zorder() for line in figure.axes[0].lines)


def test_curves_smooth_without_shifting():
    figure = figures.curves(log(), ["loss", "itm"], smooth=3)
    for panel, key in zip(figure.axes, ("loss", "itm"), strict=True):
        smooth, raw = panel.lines
        assert list(raw.get_ydata()) == [line[key] for line in log()]
        assert smooth.get_ydata()[10] == pytest.approx(np.mean([log()[step][key] for step in (9, 10, 11)]))
    assert figure.axes[0].lines[0].get_ydata()[10] == pytest.approx(log()[10]["loss"])  # a straight line stays itself


def test_curves_skip_records_of_another_kind_and_refuse_unknown_keys():
    mixed = [*log(5), {"step": 5, "t2i_r1": 20.0}]
    assert len(figures.curves(mixed, ["t2i_r1"]).axes[0].lines[0].get_xdata()) == 1
    with pytest.raises(UserError, match="'itg': choose keys among itc, itm, loss, step, t2i_r1"):
        figures.curves(mixed, ["itg"])


def test_the_label_of_the_chance_line_stands_where_no_curve_is():
    def label(values):
        lines = [{"step": step, "itc": value} for step, value in enumerate(values)]
        found, = figures.curves(lines, ["itc"], chance={"itc": 2.0}).axes[0].texts
        return found.get_ha(), found.get_va()

    falling, rising = np.linspace(4, 0, 41), np.linspace(0, 4, 41)
    assert label(falling) == ("right", "bottom")  # as a rule at the right end, above the line
    assert label(np.where(rising > 2, 2.1, rising)) == ("right", "top")  # a curve that comes to rest just above it
    assert label(np.where(np.arange(41) < 20, 4, 2 + 0.2 * (-1) ** np.arange(41)))[0] == "left"  # or crosses it there


# --- sheets ---

def test_caption_sheet_keeps_every_word_below_its_picture():
    long = "a very long caption " * 6
    captions = [{"ours": long, "reference": "a cat"}, {"ours": "", "reference": "two dogs"}] * 3
    figure = figures.caption_sheet([picture()] * 6, captions)
    assert len(figure.axes) == 6
    found = " ".join(texts(figure))
    assert found.count("ours: " + long.strip()) == 3 and found.count("reference: two dogs") == 3
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert not any(box.overlaps(panel.bbox) for panel in figure.axes)
    assert "(empty)" in texts(figures.caption_sheet([picture()], [[""]]))


def test_caption_sheet_leaves_no_gap_above_wide_pictures():
    square, wide = np.zeros((40, 40, 3), np.uint8), np.zeros((20, 40, 3), np.uint8)
    sheets = [figures.caption_sheet(some, [["a cat"]] * len(some))
              for some in ([square], [wide], [square] * 4 + [wide] * 4, [wide, square])]
    one, half, both, mixed = (figure.get_figheight() for figure in sheets)
    assert half < 0.7 * one and both == pytest.approx(one + half) and mixed == pytest.approx(one)
    for figure in sheets:
        for panel in figure.axes:
            panel.apply_aspect()
            assert panel.bbox.width == pytest.approx(0.94 * 2.3 * figure.dpi)


@pytest.mark.parametrize("sheet", [lambda: figures.caption_sheet([picture()], []),
                                   lambda: figures.caption_sheet([], [])])
def test_sheets_refuse_unequal_lists(sheet):
    with pytest.raises(UserError, match="pictures and 0"):
        sheet()


# --- modality gap ---

def test_modality_gap_keeps_distances_that_lie_in_a_plane():
    generator = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(16, 2, generator=generator))[0].T  # two orthogonal directions of sixteen
    images = torch.randn(20, 2, generator=generator) @ plane
    words = images + torch.tensor([30.0, 0.0]) @ plane
    figure = figures.modality_gap({"before": (images, words.requires_grad_())})
    panel, = figure.axes
    drawn_images, drawn_words = (points.get_offsets().data for points in panel.collections)
    assert np.linalg.norm(drawn_words - drawn_images, axis=1) == pytest.approx(np.full(20, 30), rel=1e-4)
    assert drawn_words[:, 0].min() > drawn_images[:, 0].max()  # texts are on the right
    assert len(panel.lines) == 20
    panels = figures.modality_gap({"far": (images, words), "near": (images, images + 1e-3)}).axes
    assert panels[0].get_xlim() == panels[1].get_xlim() == panels[1].get_ylim()  # one scale
    assert panel.get_title(loc="left") == "before\ncentres 30.00 apart, pairs 30.00"


def test_modality_gap_runs_across_however_little_it_is_of_the_spread():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 8, generator=generator) * torch.tensor([20.0, 10, 1, 1, 1, 1, 1, 0])
    both = torch.cat([wide, wide.flip(0)])  # clouds of one centre
    images, words = both[:40], both[40:] + 3.0 * torch.eye(8)[7]
    panel, = figures.modality_gap({"after": (images, words)}).axes
    drawn = [points.get_offsets().data for points in panel.collections]
    assert drawn[1][:, 0] - drawn[0][:, 0] == pytest.approx(np.full(40, 3.0), abs=1e-3)  # a principal axis hides it
    assert np.ptp(drawn[0][:, 1]) > 40  # upwards is the widest of the rest
    panel, = figures.modality_gap({"none": (images, images.flip(0))}).axes  # no gap at all: still a figure
    assert len(panel.lines) == 40


def test_modality_gap_refuses_unequal_clouds():
    with pytest.raises(UserError, match=r"\(4, 3\) and \(5, 3\)"):
        figures.modality_gap({"uneven": (torch.rand(4, 3), torch.rand(5, 3))})
