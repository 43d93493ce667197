"""Imported, it makes the speed comparison brief here: for builds whose tests look at other things."""

from factory.evaluation.speed import compare_speed
from tests.builders.commands import BRIEF

compare_speed.__kwdefaults__.update(BRIEF)
