"""SVG pictures for pages and files: marks, axes, legends, and the colors of the page.

Not matplotlib: each instruction of a timeline has a tooltip, colors follow a light or a dark page, and text stays text.
It would also cost a second of start-up and tens of megabytes of the container image.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

from markupsafe import Markup, escape

_SHEET = (files("shoestring.launch.answers") / "style.css").read_text(encoding="utf-8")
_COLOR = re.compile(r"--([\w-]+): (#\w+)")
_LIGHT_SHEET, _, _DARK_SHEET = _SHEET.partition("prefers-color-scheme: dark")
LIGHT: Mapping[str, str] = dict(_COLOR.findall(_LIGHT_SHEET))
"""Colors of the page's style sheet by name."""
_DARK: Mapping[str, str] = dict(_COLOR.findall(_DARK_SHEET))
"""Colors that differ on a dark page."""
_FONT = "Helvetica, Arial, sans-serif"
"""Font of pictures of a fixed size, whose boxes are drawn to fit it; others have the page's font."""
_CHARACTER = 0.55
"""Mean width of a character, as a share of the font size."""
_TICK_DISTANCE = 60.0
"""Least pixels between the ticks of a time axis."""
_SWATCH = 14.0


def mark(tag: str, content: str = "", color: str = "", /, **attributes: str | float) -> Markup:
    """Return one SVG element; text `content` is escaped.

    `color` is a color's name in the page's style sheet, or a fill such as `#f0a830`. Attributes are named with `_` for
    `-`; empty ones are left out.
    """
    given = {"class" if color in LIGHT else "fill": color, **attributes}
    words = Markup("").join(
        Markup(' {}="{}"').format(name.replace("_", "-"), value if isinstance(value, str) else _short(value))
        for name, value in given.items()
        if value != ""
    )
    inside = escape(content)
    return Markup(f"<{tag}{words}>{inside}</{tag}>" if inside else f"<{tag}{words}/>")


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def rect(x: float, y: float, width: float, height: float, color: str, /, **attributes: str | float) -> Markup:
    """Return a filled box."""
    return mark("rect", "", color, x=x, y=y, width=width, height=height, **attributes)


def dot(x: float, y: float, radius: float, color: str) -> Markup:
    """Return a filled circle."""
    return mark("circle", "", color, cx=x, cy=y, r=radius)


def line(x1: float, y1: float, x2: float, y2: float, color: str, /, **attributes: str | float) -> Markup:
    """Return a straight line."""
    return mark("line", "", color, x1=x1, y1=y1, x2=x2, y2=y2, stroke="currentColor", **attributes)


def path(d: str, color: str, /, **attributes: str | float) -> Markup:
    """Return a line along `d`."""
    return mark("path", "", color, d=d, fill="none", stroke="currentColor", **attributes)


def text(x: float, y: float, words: str, color: str = "", /, **attributes: str | float) -> Markup:
    """Return text whose baseline begins at (x, y); `text_anchor` may be `middle` or `end`."""
    return mark("text", words, color, x=x, y=y, **attributes)


def group(title: str, marks: Iterable[Markup]) -> Markup:
    """Return marks with a tooltip."""
    return mark("g", Markup("").join([mark("title", title), *marks]))


def text_width(words: str, font_size: float) -> float:
    """Estimate the pixels of a line of text."""
    return _CHARACTER * font_size * len(words)


def ink_on(background: str) -> str:
    """Return white or a dark color, whichever is readable on `background` (`#rrggbb`), by luma."""
    red, green, blue = channels(background)
    return "#ffffff" if 0.299 * red + 0.587 * green + 0.114 * blue < 135 else LIGHT["ink"]


def channels(color: str) -> tuple[int, ...]:
    """Return red, green and blue of `#rrggbb`."""
    return tuple(int(color[start : start + 2], 16) for start in (1, 3, 5))


def tick_values(low: float, high: float, most: int) -> list[float]:
    """Return at most `most` round numbers from `low` to `high`."""
    least = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(least))
    step = next(step for base in (1, 2, 2.5, 5, 10, 20) if (step := base * magnitude) >= least)
    return [step * index for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def time_axis(left: float, y: float, width: float, duration: float, unit: str) -> Iterator[Markup]:
    """Yield an axis from 0 to `duration` in `unit`, `width` pixels long, with its ticks below it."""
    yield line(left, y, left + width, y, "rule")
    for value in tick_values(0.0, duration, max(1, int(width / _TICK_DISTANCE))):
        x = left + value / duration * width
        yield line(x, y, x, y + 4, "rule")
        yield text(x, y + 16, f"{value:g}", "faint", font_size=10, text_anchor="middle")
    yield text(left - 10, y + 16, unit, "faint", font_size=10, text_anchor="end")


@dataclass(frozen=True)
class LegendMark:
    """Entry of a legend inside a picture."""

    words: str
    marks: Iterable[Markup]
    """Marks in a box from (0, 0) to (`width`, 14)."""
    width: float = _SWATCH
    initial: str = ""
    """Bold text before `words`."""


def legend(left: float, top: float, right: float, entries: Iterable[LegendMark]) -> tuple[list[Markup], float]:
    """Return the entries in rows between `left` and `right`, and the y below them."""
    drawn, x, y = list[Markup](), left, top
    for entry in entries:
        words = Markup("").join([mark("tspan", f"{entry.initial} ", font_weight="bold"), entry.words])
        width = entry.width + 6 + text_width(words.striptags(), 11)
        if x > left and x + width > right:
            x, y = left, y + 20
        label = text(entry.width + 6, 11, words if entry.initial else entry.words, font_size=11)
        drawn.append(mark("g", Markup("").join([*entry.marks, label]), transform=f"translate({_short(x)} {_short(y)})"))
        x += width + 18
    return drawn, y + _SWATCH


def picture(width: float, height: float, marks: Iterable[Markup], **attributes: str | float) -> Markup:
    """Return a picture of a fixed size, for a file or a page, with a light or a dark ground as its reader prefers."""
    body = [rect(0, 0, width, height, "ground"), *marks]
    return _svg(width, height, body, {"width": width, "height": height, "font_family": _FONT, **attributes})


def page_picture(width: float, height: float, marks: Iterable[Markup], label: str, **attributes: str | float) -> Markup:
    """Return a picture that is as wide as the page lets it be. `label` describes it to those who do not see it."""
    return _svg(width, height, marks, {"role": "img", "aria_label": label, **attributes})


def _svg(width: float, height: float, marks: Iterable[Markup], attributes: Mapping[str, str | float]) -> Markup:
    body = Markup("\n").join(marks)
    given: dict[str, str | float] = {
        "xmlns": "http://www.w3.org/2000/svg",
        "viewBox": f"0 0 {_short(width)} {_short(height)}",
        "font_size": 12,
        "fill": "currentColor",
    }
    return mark("svg", _style(body) + body, **(given | {**attributes}))


def _style(body: str) -> Markup:
    """Return the rules of the colors that `body` uses, in light and in dark."""
    used = sorted(set(re.findall(r' class="([\w-]+)"', body)) & LIGHT.keys())

    def rules(colors: Mapping[str, str]) -> str:
        root = f"svg{{color:{colors['ink']}}}"
        return root + "".join(f"svg .{name}{{color:{colors[name]}}}" for name in used if name in colors)

    hover = "svg .hover{opacity:0}svg .hover:hover{opacity:1}" if "hover" in used else ""
    # None of these rules has a character that XML or HTML would read as markup.
    return Markup(f"<style>{rules(LIGHT)}{hover}@media (prefers-color-scheme:dark){{{rules(_DARK)}}}</style>")
