"""The resolved arguments of a run, kept beside what it wrote."""

import os
import tempfile
from pathlib import Path

import yaml

from veomni.config.base import Section
from veomni.config.yaml_file import CoreDumper
from veomni.errors import ConfigError
from veomni.version import __version__


def save_args(config: Section, output_dir: str | Path) -> Path:
    """Write ``<output_dir>/veomni_cli.yaml``, which reads back as an equal configuration, and return its path.

    The schema holds no secrets; the file is readable by its owner only all the same, and replaced in one step.
    """
    path = Path(output_dir) / "veomni_cli.yaml"
    body = yaml.dump(config.model_dump(), Dumper=CoreDumper, sort_keys=False, width=120)
    text = f"# Every argument of a run of veomni {__version__}; start it again with this file.\n{body}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}", "give another --train.output_dir") from None
    return path
