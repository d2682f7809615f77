"""Whether a run may begin or go on in its folder. All of this is checked before any file is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from lit_offrl.data.datamodule import D4RLDataModule
from lit_offrl.data.sources import find_source
from lit_offrl.errors import UserError
from lit_offrl.ranges import flat
from lit_offrl.run_folder import RunFolder
from lit_offrl.system.ranks import launched_rank


class RunIsFinished(Exception):  # noqa: N818 (it is no error)
    """The run has been trained already."""


def refuse_used_folder(folder: RunFolder, overwrite: bool) -> None:
    """Refuse to begin a run where there is one.

    Raises:
        UserError: The folder holds a run that is not to be overwritten.
    """
    if launched_rank() == 0 and folder.is_used() and not overwrite:  # other ranks may see files of rank 0
        raise UserError(
            f"{folder.path} holds a run already: go on with it (--ckpt_path last), start anew (--overwrite true), or "
            "choose another --seed_everything or --trainer.default_root_dir"
        )


def goes_on(folder: RunFolder, config: Any, options: Mapping[str, Any]) -> bool:
    """Return whether `--ckpt_path auto` goes on with the run in the folder; False where it has to begin.

    Args:
        folder: The run folder.
        config: Configuration of the command.
        options: The same as plain values.

    Raises:
        RunIsFinished: The run has made all its gradient steps.
        UserError: The run has other data, or other options of model or data.
    """
    has_checkpoint = folder.last_checkpoint.is_file()
    if has_checkpoint:
        _refuse_other_options(folder, options)
    results = folder.results()
    if results.get("status") == "finished" and results.get("gradient_steps", 0) >= config.trainer.max_steps:
        data = D4RLDataModule(**config.data.as_dict())
        source = find_source(config.data.dataset)
        if source.is_own and data.info.sha256 != results.get("dataset_sha256"):
            raise UserError(
                f"data.dataset: the run in {folder.path} was trained on other data of the name "
                f"{source.run_name(config.data.dataset)}: choose another --trainer.default_root_dir"
            )
        raise RunIsFinished(f"finished already; everything is in {folder.path}")
    return has_checkpoint


def _refuse_other_options(folder: RunFolder, options: Mapping[str, Any]) -> None:
    try:
        before = _model_and_data(yaml.safe_load((folder.path / "config.yaml").read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return  # there is nothing to compare with
    for key, value in _model_and_data(options).items():
        if key != "data.dataset" and key in before and before[key] != value:
            raise UserError(
                f"{key}: the run in {folder.path} was begun with {before[key]}, not with {value}: go on with the new "
                "value (--ckpt_path last), start anew (--overwrite true), or choose another --trainer.default_root_dir"
            )


def _model_and_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide what is learned, with dotted names."""
    return flat({part: config[part] for part in ("model", "data")})
