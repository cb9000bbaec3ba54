"""Numbers and units as people and models write them: signs, thousands, mixed fractions, powers of ten, currencies, percent."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

LONGEST = 200  # characters of what can be a number

# Characters that mean the same as plainer ones.
_PLAIN = str.maketrans(
    dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-")
    | dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\n\r", " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
    | dict.fromkeys("\u2044\u2215\u00f7", "/")
    | dict.fromkeys("\u00d7\u22c5\u00b7\u2219\u2217", "*")
    | {chr(0xFF01 + i): chr(0x21 + i) for i in range(94) if 0xFF01 + i != 0xFF0D}
    | {c: " " + unicodedata.normalize("NFKC", c).replace("\u2044", "/") for c in "½⅓⅔¼¾⅕⅛⅜⅝"}  # 1/2 and so on
    | {"°": " degrees", "π": r"\pi ", "∞": r"\infty ", "µ": "μ", "٫": ".", "−": "-"}
)
_SUPERSCRIPT = re.compile(r"[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]{1,20}")
_LOWERED = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_LATEX = (
    (re.compile(r"\\[dt]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])"), ""),
    (re.compile(r"\\[,;:! ]|~"), " "),
    (re.compile(r"\^\{?\\circ\}?"), " degrees"),
    (re.compile(r"\\(?:cdot|times)(?![A-Za-z])"), "*"),
    (re.compile(r"\\([$%€£])"), r"\1"),
    (re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mathit|operatorname|mbox)\{([^{}]{0,80})\}"), r" \1 "),
)  # fmt: skip

_DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,16}|\d{1,3}(?: \d{3}){1,16}|\d{1,100})"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d{{0,100}})?|\.\d{{1,100}})"
_WHOLE = r"\d{1,40}"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]? ?)(?P<money>[$€£¥]?) ?(?P<sign2>[+-]?)(?:"
    rf"(?P<whole>{_WHOLE}) ?(?: (?P<top>{_WHOLE}) ?/ ?(?P<bottom>{_WHOLE})"
    rf"|\\frac ?(?:\{{ ?(?P<ftop>{_WHOLE}) ?\}} ?\{{ ?(?P<fbottom>{_WHOLE}) ?\}}|(?P<t>\d)(?P<b>\d)))"
    rf"|\\frac ?(?:\{{ ?(?P<above>[+-]?{_DECIMAL}) ?\}} ?\{{ ?(?P<below>[+-]?{_DECIMAL}) ?\}}|(?P<a>\d) ?(?P<c>\d))"
    rf"|(?P<over>{_DECIMAL}) ?/ ?(?P<under>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})(?:[eE](?P<e>[+-]?\d{{1,3}})| ?[*x] ?10 ?\^ ?\{{?(?P<power>[+-]?\d{{1,3}})\}}?)?"
    rf")(?P<unit>.{{0,60}})"
)  # fmt: skip
_POWER = r"(?:\^\{?-?\d\}?)?"
_MEASURE = re.compile(
    rf"(?<![\w.,])[+-]?[$€£¥]?{_DECIMAL}(?: ?(?:%|[A-Za-zμΩ]{{1,20}}{_POWER}(?:/[A-Za-z]{{1,20}}{_POWER})?))?"
)
_UNIT = re.compile(
    r" {0,4}(?:%|[A-Za-zμΩÅ$€£¥][A-Za-zμΩÅ \-]{0,40}(?:\^ ?\{?-?\d\}?)?(?:[ */.][A-Za-zμΩ ]{1,20}(?:\^ ?\{?-?\d\}?)?){0,3}) {0,4}"
)
_NO_UNIT = frozenset(
    """and approx by cos divided e exp for from i if infinity infty is ln log minus mod not of or over pi plus pm sin sqrt squared
    tan than theta times to with""".split()  # noqa: SIM905
)
_TIMES = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SYMBOLS = "mgslhtNJKWVAFCLΩ"  # units of one letter
_NAMED = re.compile(r"[A-Za-z](?:_\{?\w{1,8}\}?)? ?(?:=|\\approx|≈) ?")

# unit: (dimension, factor)
_UNITS: dict[str, tuple[str, Fraction]] = {
    **{name: ("L", Fraction(f)) for name, f in {
        "m": "1", "meter": "1", "metre": "1", "km": "1000", "kilometer": "1000", "kilometre": "1000", "cm": "1/100",
        "centimeter": "1/100", "centimetre": "1/100", "mm": "1/1000", "millimeter": "1/1000", "millimetre": "1/1000",
        "dm": "1/10", "μm": "1/1000000", "nm": "1/1000000000", "in": "254/10000", "inch": "254/10000", "inche": "254/10000",
        "ft": "3048/10000", "foot": "3048/10000", "feet": "3048/10000", "yd": "9144/10000", "yard": "9144/10000",
        "mi": "1609344/1000", "mile": "1609344/1000"}.items()},
    **{name: ("M", Fraction(f)) for name, f in {
        "kg": "1", "kilogram": "1", "g": "1/1000", "gram": "1/1000", "mg": "1/1000000", "milligram": "1/1000000", "t": "1000",
        "tonne": "1000", "lb": "45359237/100000000", "pound": "45359237/100000000", "oz": "45359237/1600000000",
        "ounce": "45359237/1600000000"}.items()},
    **{name: ("T", Fraction(f)) for name, f in {
        "s": "1", "sec": "1", "second": "1", "ms": "1/1000", "millisecond": "1/1000", "min": "60", "minute": "60", "h": "3600",
        "hr": "3600", "hour": "3600", "day": "86400", "week": "604800"}.items()},
    **{name: ("V", Fraction(f)) for name, f in {
        "l": "1", "liter": "1", "litre": "1", "ml": "1/1000", "milliliter": "1/1000", "millilitre": "1/1000", "cl": "1/100",
        "dl": "1/10"}.items()},
    **{name: ("$", Fraction(f)) for name, f in {"$": "1", "dollar": "1", "usd": "1", "cent": "1/100", "¢": "1/100"}.items()},
    **{name: ("€", Fraction(1)) for name in ("€", "euro", "eur")},
    **{name: ("£", Fraction(1)) for name in ("£", "gbp")},
    **{name: ("¥", Fraction(1)) for name in ("¥", "yen", "jpy", "yuan", "cny")},
    **{name: ("°", Fraction(1)) for name in ("degree", "deg")},
    "%": ("", Fraction(1, 100)), "percent": ("", Fraction(1, 100)), "per cent": ("", Fraction(1, 100)),
}  # fmt: skip


@dataclass(frozen=True)
class Number:
    """A number with its unit.

    Attributes:
        value: Exact.
        digits: Significant digits of a decimal; 0 of a whole number or fraction.
        last: Value of one in a decimal's last digit.
        unit: The unit as it is written, in lower case where that changes nothing; "" for none.
    """

    value: Fraction
    digits: int = 0
    last: Fraction = Fraction(0)
    unit: str = ""


def plain(text: str) -> str:
    """`text` with plain signs and spaces, and without what LaTeX says about looks only."""
    if not text.isascii():
        text = _SUPERSCRIPT.sub(lambda m: f"^{{{m[0].translate(_LOWERED)}}}", text)
    text = text.translate(_PLAIN)
    if "\\" in text or "{,}" in text or "~" in text:
        for pattern, instead in _LATEX:
            text = pattern.sub(instead, text)
    return text


def number(text: str, *, attached: bool = False) -> Number | None:
    """The number that a text is, and nothing else; None otherwise. A name before an equals sign ("x = 5") is left out.

    Args:
        text: A text of any length; one too long for a number is none.
        attached: Whether a letter without a blank is a unit ("5m"); otherwise that is a product.
    """
    if len(text) > 4 * LONGEST:
        return None
    text = " ".join(undelimited(plain(text).strip(" *_`")).split())
    if len(text) > LONGEST or not any(c.isdigit() for c in text):
        return None
    named = _NAMED.match(text)
    found = _NUMBER.fullmatch(text[named.end() :] if named else text)
    if found is None:
        return None
    unit = found["unit"].strip().rstrip(".,;:?").strip()
    if unit and not _UNIT.fullmatch(unit):
        return None
    words = re.findall(r"[^\W\d_]{1,60}", unit)
    if len(unit) == 1 and unit.isalpha() and (unit not in _SYMBOLS or (found["unit"][0] == unit and not attached)):
        return None
    if len(words) > 4 or _NO_UNIT & {w.lower() for w in words}:
        return None
    value, digits, last = _value(found)
    if value is None:
        return None
    if "-" in found["sign"] + found["sign2"]:
        value = -value
    if words and words[0].lower() in _TIMES:
        value, last = value * _TIMES[words[0].lower()], last * _TIMES[words[0].lower()]
        unit = unit[len(words[0]) :].strip()
    return Number(value, digits, last, unit or found["money"])


def last_measure(text: str) -> Number | None:
    """The last number in a text that has a known unit; None without one."""
    for found in reversed(list(_MEASURE.finditer(plain(text[-1600:])))):
        measured = number(found[0], attached=True)
        if measured is not None and measured.unit and _dimensions(measured.unit) is not None:
            return measured
    return None


def same_number(gold: Number, found: Number) -> bool:
    """Equality in value and unit; a unit that only one of them has is left out.

    A decimal of six or more digits may be a rounded or cut one, unless a whole number is asked for.
    """
    factor = Fraction(1)
    if gold.unit and found.unit:
        ratio = _ratio(found.unit, gold.unit)
        if ratio is None:
            return False
        factor = ratio
    elif (gold.unit or found.unit) in ("%", "percent", "per cent") and _close(
        gold.value * (Fraction(1, 100) if gold.unit else 1),
        found.value * (Fraction(1, 100) if found.unit else 1),
        found,
        gold,
    ):
        return True
    return _close(gold.value, found.value * factor, found, gold)


def _close(gold: Fraction, found: Fraction, written: Number, asked: Number) -> bool:
    if gold == found:
        return True
    rounded = [n for n in (written, asked) if n.digits >= 6]
    if gold.denominator == 1 or not rounded:
        return False
    scale = abs(found / written.value) if written.value else Fraction(1)
    return any(abs(gold - found) < n.last * max(scale, Fraction(1, 10**9)) for n in rounded if n.last)


def _value(found: re.Match[str]) -> tuple[Fraction | None, int, Fraction]:
    top, bottom = found["top"] or found["ftop"] or found["t"], found["bottom"] or found["fbottom"] or found["b"]
    above, below = found["above"] or found["a"] or found["over"], found["below"] or found["c"] or found["under"]
    try:
        if top is not None:
            return int(found["whole"]) + Fraction(int(top), int(bottom)), 0, Fraction(0)
        if above is not None:
            return _decimal(above) / _decimal(below), 0, Fraction(0)
    except ZeroDivisionError:
        return None, 0, Fraction(0)
    written = found["decimal"]
    power = int(found["e"] or found["power"] or 0)
    scale = Fraction(10) ** power
    behind = len(written.partition(".")[2])
    digits = len(re.sub(r"\D", "", written).lstrip("0")) if behind or power else 0
    return _decimal(written) * scale, digits, scale / 10**behind


def _decimal(text: str) -> Fraction:
    text = text.replace(",", "").replace(" ", "")
    return Fraction(text.rstrip(".")) if text.strip("+-.") else Fraction(0)


def undelimited(text: str) -> str:
    """Without the delimiters of mathematics around it and a full stop behind it; a dollar sign before a number stays."""
    text = text.strip().rstrip(".,;:").strip()
    for begin, end in (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("$", "$"), ("**", "**")):
        if text.startswith(begin) and text.endswith(end) and len(text) > len(begin) + len(end):
            return text[len(begin) : len(text) - len(end)].strip().rstrip(".,;:").strip()
    return text


@cache
def _dimensions(unit: str) -> tuple[tuple[tuple[str, int], ...], Fraction] | None:
    """Exponents by dimension, and the factor; None for a unit that is not known."""
    powers: dict[str, int] = {}
    factor, sign = Fraction(1), 1
    if unit.startswith(("square ", "cubic ")):
        unit = unit.partition(" ")[2].strip() + ("^2" if unit.startswith("square") else "^3")
    for part in re.findall(r"/|[^/*]{1,40}", unit.replace(" per ", "/")):
        if part == "/":
            sign = -1
            continue
        word = re.fullmatch(r"\s{0,4}([^\s^]{1,20}|per cent)\s{0,4}(?:\^ ?\{?(-?\d)\}?)?\s{0,4}", part)
        if word is None:
            return None
        name = word[1] if word[1] in _UNITS else word[1].lower()
        known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
        if known is None:
            return None
        exponent = sign * int(word[2] or 1)
        factor *= known[1] ** exponent
        dimension, times = ("L", 3) if known[0] == "V" else (known[0], 1)
        if known[0] == "V":
            factor *= Fraction(1, 1000) ** exponent
        if dimension:
            powers[dimension] = powers.get(dimension, 0) + times * exponent
        sign = 1
    return tuple(sorted((d, p) for d, p in powers.items() if p)), factor


def _ratio(found: str, gold: str) -> Fraction | None:
    """What a number in unit `found` is multiplied by to be in unit `gold`; None where they measure different things."""
    if {found.lower().rstrip("s"), gold} in ({"pound", "£"},) or {gold.lower().rstrip("s"), found} in ({"pound", "£"},):
        return Fraction(1)
    ours, theirs = _dimensions(found), _dimensions(gold)
    if ours is not None and theirs is not None:
        return ours[1] / theirs[1] if ours[0] == theirs[0] else None
    words = [{w.rstrip("s") for w in re.findall(r"[^\W\d_]{1,40}", unit.lower())} for unit in (found, gold)]
    return Fraction(1) if words[0] & words[1] else None
