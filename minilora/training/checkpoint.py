"""Checkpoints of a training run: written whole or not at all, read back bit for bit.

    output_dir/checkpoint-000120/
        adapter_config.json, adapter_model.safetensors   the adapter, as PEFT has it: usable as it is
        trainer_state.safetensors                        trained parameters, what the adapter keeps beside them (where
                                                         it started from), AdamW's moments, torch's random states
        trainer_state.json                               step, best evaluation, Python's and NumPy's random states,
                                                         what the run was started with, and the tensors' checksums

A folder is written under a temporary name and renamed: a crash or a full disk leaves the earlier checkpoints good.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minilora.adapters import TrainedCopy, adapters_named
from minilora.errors import InputError
from minilora.formats import save_adapter
from minilora.training.config import TrainConfig
from minilora.training.fingerprint import differences
from minilora.training.optimizer import optimizer_state, restore_optimizer
from minilora.training.random_states import (
    check_random_states,
    python_random_states,
    set_python_random_states,
    set_torch_random_states,
    torch_random_states,
)

Parameters = Mapping[str, nn.Parameter]
TENSORS, STATE = "trainer_state.safetensors", "trainer_state.json"
GROWTH_INTERVAL = 2000  # steps after which the loss scale of float16 is doubled


@dataclass
class Progress:
    """How far a run is: everything that changes from step to step beside tensors and random states."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_eval_loss: float | None = None
    evaluations_since_best: int = 0
    loss_scale: float = 1.0  # more than 1 in float16 only
    steps_at_scale: int = 0

    def check(self) -> None:
        """Raise TypeError where a value, read from a file, is of the wrong kind."""
        for name, kind in get_type_hints(Progress).items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} is {getattr(self, name)!r}")
        if not 1 <= self.loss_scale < math.inf:
            raise TypeError(f"loss_scale is {self.loss_scale!r}")

    def add_step(self, tokens: int, seconds: float) -> None:
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        self.steps_at_scale += 1
        if self.loss_scale > 1 and self.steps_at_scale >= GROWTH_INTERVAL:
            self.loss_scale, self.steps_at_scale = 2 * self.loss_scale, 0

    def lower_loss_scale(self) -> None:
        self.loss_scale, self.steps_at_scale = self.loss_scale / 2, 0

    def add_evaluation(self, eval_loss: float) -> bool:
        """Take the held-out loss of this step in; True if it is the lowest so far."""
        is_best = eval_loss < (math.inf if self.best_eval_loss is None else self.best_eval_loss)  # NaN never is
        if is_best:
            self.best_step, self.best_eval_loss, self.evaluations_since_best = self.step, eval_loss, 0
        else:
            self.evaluations_since_best += 1
        return is_best

    def is_out_of_patience(self, config: TrainConfig) -> bool:
        patience = config.early_stopping_patience
        return patience is not None and self.evaluations_since_best >= patience


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step:06d}"


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoints of a run, the lowest step first."""
    steps = [path.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*")]
    return [output_dir / f"checkpoint-{step}" for step in sorted(filter(str.isdigit, steps), key=int)]


def latest_checkpoint(output_dir: Path) -> Path | None:
    return next(reversed(checkpoints(output_dir)), None)


def checkpoint_to_resume(config: TrainConfig) -> Path | None:
    """The checkpoint a run continues from, or None; InputError if output_dir holds a run that is not to be resumed."""
    latest = latest_checkpoint(Path(config.output_dir))
    if config.resume is None:
        if latest is not None:
            raise InputError(
                f'{latest} is there already: continue it with resume="auto" (--resume auto), '
                "or choose another output_dir"
            )
        return None
    if config.resume == "auto":
        return latest
    checkpoint = Path(config.resume)
    if not checkpoint.is_dir():
        raise InputError(f"resume: there is no checkpoint folder {checkpoint}")
    if checkpoint.resolve().parent != Path(config.output_dir).resolve():
        raise InputError(f"a run is resumed where its log is: set output_dir to {checkpoint.parent}")
    return checkpoint


def save_checkpoint(
    output_dir: Path,
    model: nn.Module,
    adapter: str,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    run: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write checkpoint-<step> atomically, then delete old ones: `keep_last` newest stay, and the best evaluated."""
    path = checkpoint_path(output_dir, progress.step)
    tensors = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
    tensors |= {f"optimizer.{key}": value for key, value in optimizer_state(optimizer, parameters).items()}
    for layer, of_layer in adapters_named(model, adapter).items():  # what it keeps beside its parameters
        buffers = of_layer.named_buffers(recurse=isinstance(of_layer, TrainedCopy))
        tensors |= {f"buffer.{layer}.{name}": buffer for name, buffer in buffers}
    tensors |= torch_random_states()
    state = {
        "progress": asdict(progress),
        "run": dict(run),
        "random": python_random_states(),
        "tensors": checksums(tensors),
    }

    def write(folder: Path) -> None:
        save_adapter(model, folder, adapter)
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / TENSORS)
        (folder / STATE).write_text(_json(state), encoding="utf-8")

    _replace_folder(path, write)
    best = checkpoint_path(output_dir, progress.best_step) if progress.best_step is not None else None
    for old in checkpoints(output_dir)[:-keep_last]:
        if old not in (best, path):
            shutil.rmtree(old)
    return path


def save_adapter_atomically(path: Path, model: nn.Module, adapter: str) -> None:
    """Write the adapter's PEFT folder under a temporary name, then rename it to `path`."""
    _replace_folder(path, lambda folder: save_adapter(model, folder, adapter))


def _replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary folder), then put that folder in the place of `path`; InputError if it cannot be written."""
    temporary, previous = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    for leftover in (temporary, previous):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())  # a full disk shows here at the latest, before the rename
        if path.exists():  # a folder that is not empty cannot be renamed over
            path.replace(previous)
        temporary.replace(path)
    except (OSError, SafetensorError, InputError) as error:
        raise InputError(f"cannot write {path}: {error}; what was saved before is as it was") from None
    finally:
        if previous.exists() and not path.exists():
            previous.replace(path)
        for leftover in (temporary, previous):
            shutil.rmtree(leftover, ignore_errors=True)


def _json(value: Any) -> str:
    return json.dumps(value, default=sorted)  # a set, such as PEFT's target_modules, in one order


# --- back again -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole: what `restore` puts back."""

    progress: Progress
    tensors: dict[str, Tensor]
    random: dict[str, Any]  # Python's and NumPy's states


def read_checkpoint(path: Path, run: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint of the run that has this fingerprint.

    Raises InputError if it is not readable, names the tensor that is not what was saved, or what differs if it belongs
    to another run.
    """
    try:
        state, tensors = _read(path)
        saved = Checkpoint(Progress(**state["progress"]), tensors, state["random"])
        saved.progress.check()
        check_random_states(saved.random, tensors)
        different = differences(state["run"], json.loads(_json(run)))
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(f"cannot resume from {path}: {STATE} is damaged: {type(error).__name__}: {error}") from None
    except InputError as error:
        raise InputError(f"cannot resume from {path}: {error}") from None
    if different:
        raise InputError(
            f"cannot resume from {path}, it is of another run: {'; '.join(different)}."
            " Start with what it was started with, or start anew in another output_dir."
        )
    return saved


def restore(
    saved: Checkpoint, model: nn.Module, adapter: str, parameters: Parameters, optimizer: torch.optim.Optimizer
) -> None:
    """Put the adapter, optimizer and random states back as they were when the checkpoint was saved."""
    tensors = saved.tensors
    _copy_parameters(tensors, parameters)
    _set_adapter_buffers(tensors, model, adapter)
    of_optimizer = {key.removeprefix("optimizer."): t for key, t in tensors.items() if key.startswith("optimizer.")}
    restore_optimizer(optimizer, parameters, of_optimizer)
    set_torch_random_states(tensors)
    set_python_random_states(saved.random)


def restore_parameters(output_dir: Path, step: int, parameters: Parameters) -> None:
    """Copy the trained parameters of checkpoint-<step> into the model; InputError where it is not as it was saved."""
    path = checkpoint_path(output_dir, step)
    try:
        _, tensors = _read(path)
    except InputError as error:
        raise InputError(f"cannot take the best parameters from {path}: {error}") from None
    _copy_parameters(tensors, parameters)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The two files of a checkpoint, the tensors as they were saved; else InputError."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        tensors = load_file(path / TENSORS)
        check_tensors(tensors, state["tensors"], TENSORS)
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{type(error).__name__}: {error}") from None
    return state, tensors


@torch.no_grad()
def _copy_parameters(tensors: Mapping[str, Tensor], parameters: Parameters) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"parameter.{name}"])


def _set_adapter_buffers(tensors: Mapping[str, Tensor], model: nn.Module, adapter: str) -> None:
    """The saved ones, and not those that the adapter was made with now, from an SVD that may round otherwise."""
    for path, of_layer in adapters_named(model, adapter).items():
        if isinstance(of_layer, TrainedCopy):  # the buffers of a whole module, which are there already
            for name, buffer in of_layer.named_buffers():
                buffer.copy_(tensors[f"buffer.{path}.{name}"])
            continue
        for name in of_layer._buffers:
            saved = tensors.get(f"buffer.{path}.{name}")
            setattr(of_layer, name, None if saved is None else saved.to(next(of_layer.parameters()).device))


# --- checksums: a damaged file is told before anything of it is used --------------------------------------------------


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Dtype, shape and CRC-32 of the bytes of each, as JSON: "random.cpu": ["uint8", [5056], 2212294583]."""
    found = {}
    for name, tensor in tensors.items():
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        found[name] = [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), zlib.crc32(content)]
    return found


def check_tensors(tensors: Mapping[str, Tensor], saved: Mapping[str, list[Any]], file: str) -> None:
    """Raise InputError naming the first tensor that is not what was saved: missing, one too many, of another kind."""
    found = checksums(tensors)
    for name in sorted(found.keys() | saved.keys()):
        if name not in found:
            problem = "is missing"
        elif name not in saved:
            problem = "was not saved there"
        elif found[name][:2] != saved[name][:2]:
            (dtype, shape), (saved_dtype, saved_shape) = found[name][:2], saved[name][:2]
            problem = f"is {dtype} {shape}, and was saved as {saved_dtype} {saved_shape}"
        elif found[name] != saved[name]:
            problem = "does not have the values that were saved"
        else:
            continue
        raise InputError(f"{file} is damaged: {name} {problem}")
