"""Read untrusted YAML, such as a card's front matter, at a cost bounded by its length."""

from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

MAX_FRONT_MATTER = 1_000_000  # characters, which take seconds; the Hub's largest have a tenth of that
MAX_PARTS = 1_000_000  # with each alias expanded
MERGE_TAG = "tag:yaml.org,2002:merge"
# All that `safe_load` raises.
NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError)


class BoundedLoader(yaml.SafeLoader):
    """A loader that refuses merge keys, recursive aliases, and aliases that expand to too many parts."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._count = 0
        self._counts: dict[int, int] = {}  # id of a node → its number of parts

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        before, is_alias = self._count, self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self._counts:
            raise yaml.MarkedYAMLError(
                problem="an alias refers to a node that contains it", problem_mark=mark
            )
        self._count += self._counts[id(node)] if is_alias else 1
        if self._count > MAX_PARTS:
            raise yaml.MarkedYAMLError(
                problem=f"its aliases expand to more than {MAX_PARTS:,} parts", problem_mark=mark
            )
        self._counts.setdefault(id(node), self._count - before)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, _ in node.value:
            if key.tag == MERGE_TAG:
                raise yaml.MarkedYAMLError(problem="merge keys are not allowed", problem_mark=key.start_mark)
        super().flatten_mapping(node)


def load(text: str) -> Any:
    """Parse YAML.

    Raises:
        YAMLError: The text is not YAML or would grow too large; other errors of `NOT_YAML` occur too.
    """
    return yaml.load(text, Loader=BoundedLoader)


def front_matter(text: str) -> tuple[dict[str, Any], str | None]:
    """Return a card's front matter, or an empty one with the reason why it cannot be read."""
    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}, None
    if len(match[2]) > MAX_FRONT_MATTER:
        return {}, f"its front matter has {len(match[2]):,} characters"
    try:
        values = load(match[2])
    except NOT_YAML as error:
        return {}, f"its front matter is not YAML: {' '.join(str(error).split())[:200]}"
    if values is not None and not isinstance(values, dict):
        return {}, f"its front matter is of type {type(values).__name__}, not a mapping"
    return values or {}, None
