"""The modules of the comparison page, imported from its folder as `python app.py` would."""

import importlib.util
import sys
from types import ModuleType

from factory.resources import SPACE

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SPACE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


chat_template = module("chat_template")
pair = module("pair")
session = module("session")
app = module("app")
terminal = module("terminal")
