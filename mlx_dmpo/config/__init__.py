"""Every setting, once: its name, default, range and help. Defaults < embedded model's settings < YAML < flags.

The command line's options and the reference in docs/ are made from these fields. Names that mean what
`mlx_lm.lora` means by them are its names.
"""

from .effects import without_effect
from .evaluation import EvaluateSettings, ExportSettings, SampleSettings
from .fields import CommonSettings, Lora, default_of, setting
from .planning import PlanSettings
from .preparation import CheckSettings, ConvertSettings, MovielensSettings, PrepareSettings, TableSettings
from .resolve import build, home, read_yaml, resolve
from .training import PRESETS, DmpoSettings, SftSettings, TrainSettings, describe_preset, resume_key
from .use import ExplainSettings, RankSettings, ServeSettings, UseSettings

__all__ = [
    "PRESETS",
    "CheckSettings",
    "CommonSettings",
    "ConvertSettings",
    "DmpoSettings",
    "EvaluateSettings",
    "ExplainSettings",
    "ExportSettings",
    "Lora",
    "MovielensSettings",
    "PlanSettings",
    "PrepareSettings",
    "RankSettings",
    "SampleSettings",
    "ServeSettings",
    "SftSettings",
    "TableSettings",
    "TrainSettings",
    "UseSettings",
    "build",
    "default_of",
    "describe_preset",
    "home",
    "read_yaml",
    "resolve",
    "resume_key",
    "setting",
    "without_effect",
]
