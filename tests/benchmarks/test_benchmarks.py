"""The benchmarks' machinery, on contenders of a few milliseconds. Speed itself is never asserted here."""

import json
import re
import subprocess
import sys
from importlib import metadata
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers.training import random_rows, tiny_model

from minilora.errors import InputError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_contenders_take_turns_and_the_first_one_changes(benchmarks, monkeypatch, capsys):
    turns = []
    contenders = {name: (lambda round, name=name: turns.append((round, name))) for name in "ABC"}
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)
    seconds = benchmarks.measure.take_turns(contenders, 4, CPU, warmup=1, progress="ABC")
    order = ["".join(name for round, name in turns if round == wanted) for wanted in range(5)]
    assert order == ["ABC", "BCA", "CAB", "ABC", "BCA"]
    assert {name: len(values) for name, values in seconds.items()} == {"A": 4, "B": 4, "C": 4}, "warm-up not counted"
    assert "ABC: 14 of 15 turns · 1:00 left\n" in capsys.readouterr().err


def test_spread_is_median_and_quartiles(benchmarks):
    spread = benchmarks.measure.Spread
    assert spread.of([4, 1, 3, 2, 5]) == spread(3, 2, 4)
    assert spread.of([2.5]) == spread(2.5, 2.5, 2.5)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_memory_starts_at_the_reset():
    """In a process of its own: one that has freed gigabytes serves new blocks from them."""
    script = """
import torch
from benchmarks import measure
cpu = torch.device("cpu")
block = torch.ones(128 * 2**20 // 4)
del block
measure.reset_peak_memory(cpu)
start = measure.peak_memory_mb(cpu)
block = torch.ones(64 * 2**20 // 4)
del block
print(measure.peak_memory_mb(cpu) - start)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert 60 < float(done.stdout) < 100, done.stderr  # 64 MiB; without the reset it would be none


def test_table_json_and_plot(benchmarks, tmp_path, capsys):
    result = benchmarks.output.Result(
        benchmark="sleep",
        title="Sleeping",
        machine=benchmarks.measure.machine(CPU),
        settings={"rounds": 2},
        rows=[{"contender": "A", "tokens/s": "1"}, {"contender": "B", "tokens/s": "2"}],
        raw={"seconds": {"A": [1.0, 1.1], "B": [0.5, 0.6]}},
        plot=lambda figure: figure.subplots().plot([1, 2]),
    )
    benchmarks.output.print_table(result)
    assert "contender" in capsys.readouterr().out
    json_path, png_path = benchmarks.output.write(result, tmp_path / "new")
    cpu = "cpu" if "AVX512" in result.machine["instructions"] else f"cpu-{result.machine['instructions'][0].lower()}"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"sleep-{cpu}.json", f"sleep-{cpu}.png"]
    assert png_path.read_bytes().startswith(b"\x89PNG")
    content = json.loads(json_path.read_text())
    assert content["rows"] == result.rows
    assert content["raw"] == result.raw
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["machine"]["versions"]["torch"] == metadata.version("torch")
    assert set(content["machine"]) >= {"date", "device", "cpu", "cores", "load_average_before", "commit"}


def test_the_command_lists_and_refuses(benchmarks):
    names = list(benchmarks.__main__.BENCHMARKS)

    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
        )

    listed = command()
    assert listed.returncode == 0
    assert [line.partition(":")[0] for line in listed.stdout.splitlines()] == names
    refused = command("trian")
    assert (refused.returncode, refused.stderr) == (
        2,
        f"benchmarks: there is no benchmark 'trian'; there are {', '.join(names)}\n",
    )


def test_every_merge_is_scored_against_the_tuned_model(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr("minilora.progress.clock", count(step=60).__next__)
    merge = benchmarks.merge
    model = tiny_model(nf4=True, r=4).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    scores = merge.compare(model, random_rows(12), random_rows(6, seed=1), lambda model: 10.0)
    lines = capsys.readouterr().err
    for stage in ("predictions", "changes", "loss and KL"):
        assert f"merge, {stage}: 1 of " in lines
    assert re.search(r"^merge: 7 of 8 ways to merge · [\d:]+ left$", lines, re.MULTILINE)
    base, tuned, plain = (scores[name] for name in (merge.BASE, merge.TUNED, merge.REQUANTIZED))
    assert (tuned.kl, base.kl) == (pytest.approx(0, abs=1e-5), pytest.approx(0.004, abs=0.003))
    assert set(base.cosines) == {0.0} and set(base.output_errors) == {1.0}
    assert max(tuned.errors) < 1e-6  # W + Δ − W in float32
    ours = scores["NF4, merge_to_nf4"]
    assert all(a < b for a, b in zip(ours.output_errors, plain.output_errors, strict=True))
    assert max(scores["NF4 + rank 4, merge_to_lora"].errors) < 1e-4  # the adapter's own rank
    assert max(scores["bfloat16"].errors) < 0.1 < min(plain.errors)
    for key, value in before.items():  # the new LoRAs of merge_to_lora stay beside it
        assert torch.equal(model.state_dict()[key], value)
    sizes = [merge.megabytes(name, model) for name in (merge.REQUANTIZED, merge.TUNED, "bfloat16")]
    assert sizes[0] < sizes[2] and sizes[0] < sizes[1]
    with pytest.raises(InputError, match="leave --rounds out"):
        merge.run(3, CPU)
