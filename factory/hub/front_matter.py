"""YAML of strangers, such as a card's front matter: what reading it costs is bounded by its length."""

from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

LONGEST_FRONT_MATTER = 1_000_000  # letters, which take seconds; the Hub's largest have a tenth
MOST_PARTS = 1_000_000  # with each alias written out
MERGE_TAG = "tag:yaml.org,2002:merge"
NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError)  # safe_load's


class BoundedLoader(yaml.SafeLoader):
    """Refuses merge keys, which copy what they name, and aliases that multiply it or name themselves."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = 0
        self._counts: dict[int, int] = {}  # parts in a node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        before, is_alias = self._count, self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._counts:
            raise yaml.MarkedYAMLError(problem="an alias names what it is part of", problem_mark=mark)
        self._count += self._counts[id(node)] if is_alias else 1
        if self._count > MOST_PARTS:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases make more than {MOST_PARTS:,} parts of it", problem_mark=mark
            )
        self._counts.setdefault(id(node), self._count - before)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == MERGE_TAG:
                raise yaml.MarkedYAMLError(problem="merge keys are not read", problem_mark=key.start_mark)
        super().flatten_mapping(node)


def load(text: str) -> Any:
    """What a text says in YAML.

    Raises:
        YAMLError: Or another of `NOT_YAML`: nothing, or nothing that would stay small.
    """
    return yaml.load(text, Loader=BoundedLoader)


def front_matter(text: str) -> tuple[dict[str, Any], str | None]:
    """The fields before a card's text, and in one line why there are none where they cannot be read."""
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}, None
    if len(match[2]) > LONGEST_FRONT_MATTER:
        return {}, f"its front matter has {len(match[2]):,} letters"
    try:
        values = load(match[2])
    except NOT_YAML as error:
        return {}, f"its front matter is no YAML: {' '.join(str(error).split())[:200]}"
    if values is not None and not isinstance(values, dict):
        return {}, f"its front matter is of type {type(values).__name__}, no names with values"
    return values or {}, None
