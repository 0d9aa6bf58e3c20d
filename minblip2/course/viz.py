"""The look of every figure: one style, colours with a meaning, panels, and the way onto a notebook's page.

Importing this file sets the style. Colours are Okabe and Ito's, which survive colour blindness, and differ in
lightness, so that they survive a grey printer too; what a colour says, a marker, a dash or a word says as well.
"""

from __future__ import annotations

import base64
import html
import io
import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import LogFormatterSciNotation, NullFormatter
from PIL import Image
from torch import Tensor

from .. import UserError

QUERY, TEXT, IMAGE = "#E69F00", "#0072B2", "#009E73"  # the same three meanings in every figure of the course
WRONG, INK, QUIET, FORBIDDEN, PAPER = "#D55E00", "#1A1A1A", "#555555", "#E4E4E4", "#FCFCFC"
LINES = [TEXT, QUERY, IMAGE, "#CC79A7", "#D55E00", "#56B4E9"]
DASHES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2))]
PIXELS_PER_INCH = 96  # a browser's inch, so that 10 pt letters are 10 pt on the page


def style() -> None:
    """Set the course's matplotlib style: light opaque paper (legible on light and dark themes), quiet axes."""
    matplotlib.rcParams.update({
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "figure.dpi": PIXELS_PER_INCH,
        "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.labelsize": 10,
        "legend.fontsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": QUIET, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": FORBIDDEN, "lines.linewidth": 1.8,
        "legend.frameon": False, "axes.titlelocation": "left",
        "axes.prop_cycle": matplotlib.cycler(color=LINES) + matplotlib.cycler(linestyle=DASHES),
        "text.parse_math": False})  # a caption may cost $5


style()


def drawn(figure: Figure) -> Image.Image:
    """The figure at 1.5 times its size on the page."""
    for axis in (axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)):
        if isinstance(axis.get_major_formatter(), LogFormatterSciNotation):  # whose TeX would be shown as it is
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    raw = io.BytesIO()
    figure.draw_without_rendering()  # the layout settles only in the second round
    figure.savefig(raw, format="png", dpi=1.5 * PIXELS_PER_INCH)
    return Image.open(raw).convert("RGB")


def jpeg(figure: Figure) -> bytes:
    """The figure as a JPEG: photographs need more colours than a small PNG has."""
    small = io.BytesIO()
    drawn(figure).save(small, format="jpeg", quality=75, optimize=True)
    return small.getvalue()


def png(figure: Figure) -> bytes:
    """The figure as a PNG of 256 colours: sharp, yet small in a notebook."""
    image, small = drawn(figure), io.BytesIO()
    palette = image.quantize(256, method=Image.Quantize.FASTOCTREE)  # unlike the default, it keeps rare colours
    flat = image.quantize(palette=palette, dither=Image.Dither.NONE)  # dithering would speckle even one flat colour
    flat.save(small, format="png", optimize=True)
    return small.getvalue()


def show(figure: Figure, alt: str, photographs: bool = False) -> None:
    """Display a figure in a notebook, with a sentence that says what is to be seen for those who cannot see it.

    One that shows `photographs` is a JPEG, any other a PNG. It is displayed as an HTML <img>, because JupyterLab (4.6)
    drops the `alt` metadata of plain image outputs.
    """
    from IPython.display import display  # only notebooks need it

    if not alt.strip():
        raise UserError("the alt text of this figure is empty: say in one sentence what the figure shows")
    kind, content = ("jpeg", jpeg(figure)) if photographs else ("png", png(figure))
    source = base64.b64encode(content).decode()
    width = round(figure.get_figwidth() * PIXELS_PER_INCH)
    image = f'<img alt="{html.escape(alt)}" width="{width}" src="data:image/{kind};base64,{source}">'
    display({"text/html": image, "text/plain": alt}, raw=True)


def as_array(values: object) -> np.ndarray:
    """A tensor, picture or nested list as a numpy array."""
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def make_panels(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of this size in inches, in rows of at most `columns`."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[count:]:
        unused.remove()
    return figure, axes[:count]


def draw_picture(panel: Axes, image: object) -> None:
    """Draw a picture without ticks, in a hairline frame: a white one would melt into the page."""
    pixels = as_array(image)
    panel.imshow(pixels, cmap="gray", vmin=0, vmax=255 if pixels.max() > 1 else 1)
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set(visible=True, color="#AAAAAA", linewidth=0.7)


def draw_box(panel: Axes, place: tuple[float, float, float, float], label: str, colour: str, tint: float = 0.25,
             edge: str | None = None, line: float = 1.5, dash: object = "-", opaque: bool = False,
             rounding: float = 0.8, zorder: tuple[float, float, float] = (1, 1, 3), **words: object) -> None:
    """Draw a box of a diagram: rounded, of a thin colour within an edge, its label in the middle.

    place: left, bottom, width and height. `tint` thins the colour, `edge` is that of the border if another one; an
    `opaque` box hides what lies below it. `zorder` is that of face, edge and label, `words` are settings of the label.
    """
    x, y, width, height = place
    faces = [(PAPER, "none", 1.0, 0.0, zorder[0])] if opaque else []
    faces += [(colour, "none", tint, 0.0, zorder[0]), ("none", edge or colour, 1.0, line, zorder[1])]
    for face, border, alpha, thick, order in faces:
        panel.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=f"round,pad=0,rounding_size={rounding}",
                                       facecolor=face, edgecolor=border, alpha=alpha, linewidth=thick, zorder=order,
                                       linestyle=dash if thick else "-"))  # matplotlib 3.10 refuses dashes of no width
    panel.text(x + width / 2, y + height / 2, label, zorder=zorder[2],
               **{"ha": "center", "va": "center", "fontsize": 9, "color": INK} | words)


def draw_arrow(panel: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    """Draw a thin arrow of a diagram between two points of the panel."""
    panel.add_patch(FancyArrowPatch(start, end, **{"arrowstyle": "-|>", "mutation_scale": 9, "color": QUIET,
                                                   "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0} | style))


def label_line(panel: Axes, height: float, text: str) -> None:
    """Write what a horizontal line is, at that end and on that side of it where the fewest points of curves lie."""
    inches = panel.figure.get_size_inches() / panel.get_subplotspec().get_gridspec().get_geometry()[::-1]
    wide, tall = 0.075 * len(text) / (inches[0] - 0.7), 0.22 / (inches[1] - 0.9)  # of the panel: 9 pt letters, one line
    (left, right), (low, high) = panel.get_xlim(), panel.get_ylim()
    points = np.concatenate([line.get_xydata() for line in panel.lines[:-1]])  # the last one is the line itself
    x, y = ((points - (left, low)) / (right - left, high - low)).T
    at = (height - low) / (high - low)

    def crossed(place: tuple[int, int]) -> float:
        end, side = place
        bottom = at if side > 0 else at - tall
        if side < 0 and bottom < 0 or end == 0 and bottom + tall > 1:  # off the panel, or in its title
            return math.inf
        return ((x > 1 - wide if end else x < wide) & (y > bottom) & (y < bottom + tall)).sum()

    end, side = min([(1, 1), (1, -1), (0, 1), (0, -1)], key=crossed)
    panel.annotate(text, (end, height), (2 - 4 * end, 5 * side), ha="right" if end else "left",
                   va="bottom" if side > 0 else "top", fontsize=9, xycoords=("axes fraction", "data"),
                   textcoords="offset points", bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.85, "pad": 1})
