"""YAML of recipes, read so that nothing in it passes in silence or ends in a traceback."""

from __future__ import annotations

import math
import re
from typing import Any


class RecipeError(ValueError):
    """A recipe says something that cannot be; names the place, what was expected and found."""


def read_yaml(text: str, source: str) -> Any:
    """YAML with the floats of its version 1.2 (PyYAML takes 1e-3 for text), whose keys are distinct and whose numbers are
    finite. RecipeError: it is none, or larger or deeper than any recipe."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            twins = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
            if twins:
                raise yaml.constructor.ConstructorError(
                    None, None, f"expected every key once, found {twins[0][:60]!r} twice", node.start_mark
                )
            return super().construct_mapping(node, deep)

    pattern = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", pattern, list("-+.0123456789"))
    try:
        data = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: expected YAML ({' '.join(str(error).split())})") from None
    except (RecursionError, ValueError) as error:  # a date that is none; brackets without end
        raise RecipeError(
            f"{source}: expected YAML, found what cannot be read ({type(error).__name__}: {error})"
        ) from None
    _check_plain(data, source)
    return data


def _check_plain(data: Any, source: str) -> None:
    """Refuses what no recipe holds and what would end in a traceback later: numbers that are not finite, endless structures."""
    places, seen = [(data, 0)], 0
    while places:
        value, depth = places.pop()
        seen += 1
        if depth > 30 or seen > 100_000:
            raise RecipeError(
                f"{source}: expected a recipe, found {'nesting without end' if depth > 30 else 'too much'}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise RecipeError(
                f"{source}: expected finite numbers, found {value}; leave the option out where it means no limit"
            )
        if isinstance(value, int) and abs(value) >= 2**63:
            raise RecipeError(
                f"{source}: expected numbers of at most 19 digits, found one of {value.bit_length()} bits"
            )
        if isinstance(value, dict):
            places += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, (list, tuple, set)):
            places += [(part, depth + 1) for part in value]
