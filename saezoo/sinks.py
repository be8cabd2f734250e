"""Extra places for the training log: TensorBoard and Weights & Biases. log.csv is written with or without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saezoo.errors import UsageError


class Sinks:
    """What `open_sinks` opened, possibly nothing."""

    def __init__(self, writer: Any, run: Any) -> None:
        self._writer, self._run = writer, run

    def log(self, tokens: int, layer: str, values: Mapping[str, float]) -> None:
        """Note metrics of one SAE after `tokens` training tokens, each under `layer/metric`."""
        for metric, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(f"{layer}/{metric}", value, global_step=tokens)
        if self._run is not None:
            self._run.log({f"{layer}/{metric}": value for metric, value in values.items()}, step=tokens)

    def close(self) -> None:
        """Write out what is buffered, and end the wandb run."""
        if self._writer is not None:
            self._writer.close()
        if self._run is not None:
            self._run.finish()


def open_sinks(
    folder: Path,
    *,
    tensorboard: bool,
    wandb_project: str | None,
    run_name: str,
    config: Mapping[str, Any],
    resumed_at: int = 0,
) -> Sinks:
    """Open what is asked for.

    Args:
        folder: the run folder; TensorBoard's events go to `folder`/tensorboard, wandb's files to `folder`/wandb.
        tensorboard: whether to write TensorBoard events.
        wandb_project: project of the wandb run; None for no wandb. WANDB_MODE=offline keeps it off the network.
        run_name, config: what the wandb run is called, and the settings it shows.
        resumed_at: tokens already trained on. TensorBoard then hides what an earlier session logged beyond them;
            wandb gets a new run.

    Raises UsageError if a package is missing or wandb refuses to start.
    """
    # Imported before anything is opened: a missing package leaves nothing behind.
    writer_class = _import_tensorboard() if tensorboard else None
    run = None if wandb_project is None else _start_wandb(folder, wandb_project, run_name, config)
    if writer_class is None:
        return Sinks(None, run)
    purge_step = resumed_at + 1 if resumed_at else None
    return Sinks(writer_class(str(folder / "tensorboard"), purge_step=purge_step), run)


def check_installed(*, tensorboard: bool, wandb: bool) -> None:
    """Raise UsageError if a package that is asked for is missing."""
    if tensorboard:
        _import_tensorboard()
    if wandb:
        _import_wandb()


def _import_tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("TensorBoard is not installed; pip install 'saezoo[tensorboard]'") from None
    return SummaryWriter


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise UsageError("wandb is not installed; pip install 'saezoo[wandb]'") from None
    return wandb


def _start_wandb(folder: Path, project: str, name: str, config: Mapping[str, Any]) -> Any:
    wandb = _import_wandb()
    folder.mkdir(parents=True, exist_ok=True)  # wandb would silently take a temporary folder instead
    # console: else it would take over stderr and upload whatever the terminal shows.
    settings = wandb.Settings(console="off")
    try:
        return wandb.init(project=project, name=name, config=dict(config), dir=str(folder), settings=settings)
    except wandb.Error as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UsageError(f"wandb does not start: {reason}; WANDB_MODE=offline needs no account") from None
