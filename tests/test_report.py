"""report.md word by word, and its pictures: there, readable, and never made up."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.axis import Axis
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.transforms import Bbox

from saezoo import plots, report
from saezoo.errors import SaezooError
from saezoo.report import write_report
from saezoo.results import Measured, Result

NAMES = [*map(str, range(12)), "11-post"]
METRICS = {
    "ce_sae": Measured(3.4567891, 3.412, 3.501),
    "ce_score": Measured(0.98765, 0.98, 0.99),
    "explained_variance_uncentred": Measured(0.93081234, 0.9295, 0.932),
    "l0": Measured(57.29, 56.0, 58.5),
    "l1": Measured(1234.56),
    "alive_fraction": Measured(None),
    "dead": Measured(3.0, 1.04, 4.96),
    "cosine": Measured(0.9, 0.9, 0.9),
    "unseen_density": Measured(4.6e-5),
}
PUBLISHED = {"ce_sae": 3.44, "ce_score": 0.979999, "l0": 58.6, "l1": 1234.5, "alive_fraction": None, "cosine": 0.9}
LOG = "tokens,layer,seconds,loss,mse,l1,ghost,l0,explained_variance_uncentred,ghosts,dead,tokens_per_second"

REPORT = """\
# gpt2-small-res 7 \\| again

| run |  |
| --- | --- |
| recipe | feb2024 |
| machine | 2 \\| 4 cores |

## Evaluation

Protocol `feb2024`: 65,024 tokens of builtin:heldout, from 37 documents, seed 0.

Intervals are 95 % and over documents: what another sample of text of the same kind and size would give for these \
same SAEs. They do not cover what another training seed would give. Nor do they cover the scatter of the published \
values, which come from samples of their own; and of many published values some lie outside by chance. So *inside* \
does not prove two SAEs equal, and *below* or *above* is no error of either.

### Layer 7

| metric | measured [95 % interval] | published | the published value lies |
| --- | --- | --- | --- |
| CE with SAE (nats/token) | 3.457 [3.412, 3.501] | 3.44 | inside |
| CE score | 0.988 [0.980, 0.990] | 0.979999 | below |
| explained variance, uncentred | 0.9308 [0.9295, 0.9320] | – | – |
| L0 (features/token) | 57.3 [56.0, 58.5] | 58.6 | above |
| L1 (units of the activations) | 1,235 | 1234.5 | – |
| alive fraction | – | – | – |
| dead (features) | 3 [1, 5] | – | – |
| cosine | 0.9000 [0.9000, 0.9000] | 0.9 | inside |

## Training

![training curves](training.png)
"""


def result(layer: str = "7", **changes: Any) -> Result:
    values: dict[str, Any] = {
        "collection": "gpt2-small-res",
        "layer": layer,
        "hook": f"blocks.{layer}.hook_resid_pre",
        "model": "gpt2-small",
        "protocol": "feb2024",
        "text": "builtin:heldout",
        "context": 128,
        "rows": 508,
        "tokens": 65024,
        "documents": 37,
        "seed": 0,
        "device": "cpu",
        "dtype": "float32",
        "versions": {},
        "metrics": METRICS,
        "histogram": {"edges": [-6.0, -4.0, -2.0, 0.0], "counts": [1, 20_000, 50], "never": 4525},
        "published": PUBLISHED,
    }
    return Result(**(values | changes))


def log(layers: int, rows: int = 30, header: str = LOG) -> str:
    """A log.csv whose numbers fall, or rise, smoothly."""
    lines = [header]
    for step in range(1, rows + 1):
        for i, name in enumerate(NAMES[:layers]):
            x = (i + 1) / step
            values = f"{step},{0.02 * x},{0.01 * x},{0.01 * x},0.0,{500 * x},{1 - x},0,{10 * i},20000"
            lines.append(f"{step * 10_000_000},{name},{values}")
    return "\n".join(lines) + "\n"


def written(folder: Path, results: list[Result], content: str | None = None) -> str:
    """report.md of a run folder with this log.csv."""
    if content is not None:
        (folder / "log.csv").write_text(content)
    facts = {"recipe": "feb2024", "machine": "2 | 4\ncores"}
    path = write_report(folder, "gpt2-small-res 7 | again", facts, results)
    assert path == folder / "report.md"
    return path.read_text(encoding="utf-8")


def pictures(folder: Path) -> list[str]:
    """Names of the pictures, each of which must be a complete PNG of a sensible size."""
    for path in folder.glob("*.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
        assert all(200 <= side <= 2000 for side in struct.unpack(">II", content[16:24]))
    assert not list(folder.glob(".*")), "nothing half written stays"
    return sorted(path.name for path in folder.glob("*.png"))


def test_the_report_word_by_word(tmp_path: Path) -> None:
    text = written(tmp_path, [result()], log(1))
    assert text.startswith(REPORT)
    assert text.count("![") == 3
    assert pictures(tmp_path) == ["density.png", "published.png", "training.png"]


def test_nothing_published_is_not_mentioned(tmp_path: Path) -> None:
    text = written(tmp_path, [result(published={}), result("8", published={"l0": None})], log(2))
    assert "published" not in text
    assert "| L0 (features/token) | 57.3 [56.0, 58.5] |\n" in text
    assert pictures(tmp_path) == ["density.png", "training.png"]


def test_too_few_documents_for_intervals(tmp_path: Path) -> None:
    """Then no published value is inside or outside of anything."""
    metrics = {name: Measured(measured.value) for name, measured in METRICS.items()}
    text = written(tmp_path, [result(metrics=metrics)], log(1))
    assert "There are no intervals: the text holds too few documents for them.\n" in text
    assert "| L0 (features/token) | 57.29 | 58.6 | – |\n" in text
    assert not any(word in text.split("## Training")[0] for word in ("| inside |", "| below |", "| above |"))


def test_published_on_one_sae_only(tmp_path: Path) -> None:
    text = written(tmp_path, [result(), result("8", published={})], log(2))
    assert "| L0 (features/token) | 57.3 [56.0, 58.5] | 58.6 | above |\n" in text
    assert "| L0 (features/token) | 57.3 [56.0, 58.5] | – | – |\n" in text


def test_published_but_not_measured(tmp_path: Path) -> None:
    text = written(tmp_path, [result(metrics={"ce_sae": Measured(None)}, published={"l0": 58.6})])
    assert "| CE with SAE (nats/token) | – | – | – |\n| L0 (features/token) | – | 58.6 | – |\n" in text
    assert pictures(tmp_path) == ["density.png", "published.png"]


@pytest.mark.parametrize("content", [None, "", f"{LOG}\n", "tokens,layer\n4096,7\n"])
def test_without_curves_there_is_no_picture_of_them(tmp_path: Path, content: str | None) -> None:
    assert "raining" not in written(tmp_path, [result()], content).split("## Density")[1]
    assert pictures(tmp_path) == ["density.png", "published.png"]


@pytest.mark.parametrize(
    "content",
    [
        "tokens,layer,loss,mse,l1,ghost,l0,explained_variance_uncentred,ghosts\n1024,7,0.4,0.2,0.2,0.0,511.6,-0.9,0\n",
        f"{LOG}\n4096,7,1.0,0,0,0,0,0,0,0,0,0\n8192,7,2.0,0,0,0,0,0,0,0,0,0\n",
        f"{LOG}\n4096,7,1.0,nan,inf,,0.0,0,-3,0,,\n8192,7,2.0,0.5,what,0.1\n12",
        log(13, rows=1),
    ],
    ids=["old columns, one row", "all zero", "damaged", "one row of 13 layers"],
)
def test_logs_that_are_not_smooth(tmp_path: Path, content: str) -> None:
    assert "![training curves](training.png)" in written(tmp_path, [result()], content)
    assert pictures(tmp_path) == ["density.png", "published.png", "training.png"]


def boxes_of(figure: Figure) -> list[Bbox]:
    """Where the panels with all their labels, the legends and the common labels are drawn."""
    figure.draw_without_rendering()
    boxes = [axis.get_tightbbox() for axis in figure.axes if axis.axison]
    boxes += [legend.get_window_extent() for legend in figure.findobj(Legend) if isinstance(legend, Legend)]
    return [box for box in [*boxes, *(text.get_window_extent() for text in figure.texts)] if box is not None]


def tick_labels(axis: Axis) -> list[Bbox]:
    """Boxes of an axis' tick labels, but for those that lie beyond its ends and are not drawn."""
    low, high = sorted(axis.get_view_interval())
    labels = [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]


@pytest.mark.parametrize("layers", [1, 2, 4, 12, 13])
@pytest.mark.parametrize("kind", ["training", "density", "published"])
def test_no_text_is_cut_off_or_covered(tmp_path: Path, layers: int, kind: str) -> None:
    (tmp_path / "log.csv").write_text(log(layers))
    results = [result(name) for name in NAMES[:layers]]
    figure = {
        "training": lambda: report._training(report._read_log(tmp_path / "log.csv"), report._CURVES),
        "density": lambda: plots.densities(results),
        "published": lambda: report._comparison(results),
    }[kind]()
    boxes = boxes_of(figure)
    groups = [boxes, *(tick_labels(axis) for panel in figure.axes for axis in (panel.xaxis, panel.yaxis))]
    assert not [pair for group in groups for pair in combinations(group, 2) if Bbox.intersection(*pair)]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert all(figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)


def test_every_layer_has_its_own_colour_and_name(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(log(13))
    figure = report._training(report._read_log(tmp_path / "log.csv"), report._CURVES)
    legend = figure.axes[-1].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [f"layer {name}" for name in NAMES]
    brightness = [sum(to_rgb(line.get_color())) for line in legend.get_lines()]
    assert brightness == sorted(set(brightness)), "from dark to light"


def test_the_published_picture_shows_what_was_measured() -> None:
    figure = report._comparison([result(), result("11-post", published={"l0": 57.0})])
    panel: Any = next(axis for axis in figure.axes if axis.get_ylabel() == "L0 (features/token)")
    lines = {line.get_label(): list(line.get_ydata()) for line in panel.get_lines()}
    assert (lines["measured"], lines["published"]) == ([57.29, 57.29], [58.6, 57.0])
    (bars,) = panel.collections
    assert [part[:, 1].tolist() for part in bars.get_segments()] == [[56.0, 58.5], [56.0, 58.5]]


@pytest.mark.parametrize("name", ["$x^2$", "_hidden", "a|b", "<b>", "ü"])
def test_names_are_not_markup(tmp_path: Path, name: str) -> None:
    content = log(1).replace(",0,", f",{name},", 1)
    shown = re.sub(r"([$_|<>])", r"\\\1", name)
    assert f"### Layer {shown}\n" in written(tmp_path, [result(name)], content)
    assert pictures(tmp_path) == ["density.png", "published.png", "training.png"]


def test_the_user_s_own_settings_are_not_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with rc_context({"text.usetex": True, "figure.dpi": 7}):
        written(tmp_path / "out", [result()], log(1))
    assert len(pictures(tmp_path / "out")) == 3


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaezooError, match="cannot write .*density.png: File exists"):
        write_report(tmp_path / "file", "title", {}, [result()])


def test_importing_it_does_not_import_matplotlib() -> None:
    program = "import sys, saezoo.report; sys.exit('matplotlib' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
