"""The command line run inside the test's process, on models and data of a few kilobytes."""

import contextlib
import gc
import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur import measure
from secateur.cli import main

# where other processes find this module, and the same sources that this one uses
PATHS = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
PROCESS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self):
        """What was printed, if it is one strict JSON document."""

        def refuse(word):
            raise AssertionError(f"{word} is no JSON")

        return json.loads(self.out, parse_constant=refuse)


def run(*words: object) -> Ran:
    """`secateur WORDS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv, handlers = sys.argv, {number: signal.getsignal(number) for number in SIGNALS}
    sys.argv = ["secateur", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        return Ran(end.code, out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    raise AssertionError("main() returned instead of exiting")


def good(*words: object) -> Ran:
    """A run that must succeed."""
    done = run(*words)
    assert done.code == 0, done.err
    return done


def spawn(*words: object, cwd: Path, before: str = "", env: dict[str, str] | None = None) -> subprocess.Popen:
    """`secateur WORDS` in a process of its own, after the Python code `before`."""
    command = [sys.executable, "-c", f"{before}\nfrom secateur.cli import main\nmain()", *map(str, words)]
    environment = {**os.environ, **PROCESS, **(env or {})}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def separately(*words: object, cwd: Path, before: str = "", env: dict[str, str] | None = None) -> Ran:
    """The same, waited for."""
    process = spawn(*words, cwd=cwd, before=before, env=env)
    out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out, err)


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, hidden and empty folders included."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"(folder)"
        for path in sorted(folder.rglob("*"))
    }


def machine_facts() -> measure.MachineFacts:
    """What `probe_machine` could have found; probing takes seconds."""
    rows = [measure.Row(layout, batch, 0.5, 0.4, 0.6, 1.0) for layout in measure.Layout for batch in (1, 16)]
    return measure.MachineFacts("a processor", "cpu", 1, torch.__version__, tuple(rows), {}, ("zeros bring nothing",))


def hurry(monkeypatch) -> None:
    """Real measurements of the models, but short ones; what zeros bring on this machine is made up."""
    from secateur.lab import prune, train

    gc.freeze()  # or measuring memory would look through all imported modules each time
    for job in (prune, train):
        monkeypatch.setattr(job, "measure_together", partial(measure.measure_together, seconds=0.01))
        monkeypatch.setattr(job, "probe_machine", lambda **ignored: machine_facts())


class Setter:
    """Stands for pytest's monkeypatch in a process that ends soon anyway."""

    setattr = staticmethod(setattr)


HURRIED = "import cli_runs; cli_runs.hurry(cli_runs.Setter)"


# --- models and data ----------------------------------------------------------------------------------


def net() -> nn.Module:
    """Two linears and a batch norm over images of 1x4x4, three classes."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))


class Residual(nn.Module):
    """x + linear(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def stack() -> nn.Module:
    """Six blocks that may go."""
    torch.manual_seed(5)
    blocks = nn.Sequential(*(Residual() for _ in range(6)))
    return nn.Sequential(nn.Flatten(), blocks, nn.Linear(16, 3))


def no_module() -> int:
    return 3


def infinite() -> nn.Module:
    model = net()
    with torch.no_grad():
        model[4].weight[1, 2] = float("inf")
    return model


class Explodes(nn.Module):
    """Finite weights, infinite activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.exp(1e4 * (1 + self.first(x.flatten(1)).abs())))


def explodes() -> nn.Module:
    return Explodes()


def write_language_model(folder: Path, blocks: int = 4) -> Path:
    """A Llama with the zoo's tokenizer of characters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from secateur.shrink.folder import quiet_transformers
    from secateur.zoo.language import write_tokenizer

    torch.manual_seed(blocks)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=24,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_text(path: Path, characters: int = 4000) -> Path:
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "off", "with", "it"]
    rng = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(words), (characters,), generator=rng).tolist()
    path.write_text(" ".join(words[index] for index in chosen)[:characters])
    return path


def write_images(folder: Path, size: int = 4, per_class: int = 12) -> Path:
    """Three classes of grey images."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for label in range(3):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = rng.integers(0, 80, (size, size), dtype=np.uint8) + 60 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{label}" / f"{number}.png")
    return folder
