"""Hold the engine to traces of the published code: ids, positions, cached lengths, logits.

    python test/check_golden.py DIR [--model DIR/tiny_model] [--tokenizer PATH] [CASE ...]

Runs each `<case>.json` + `<case>.npz` in a folder through the real engine, from frames to tokens,
prints a line per case with the largest deviation, and exits 0 when all match, else 1. Ids,
positions and lengths must be exact, logits within 2e-4 in float32 (a cache with wrong contents
shows as 1 to 6). What the traces hold is described in test/data/README.md.
"""
import argparse
from dataclasses import dataclass, field
import hashlib
import json
import lzma
from pathlib import Path
import shutil
import sys
import tarfile
import tempfile
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))    # these sources, not a copy installed earlier

from svlm_ros.engine.config import StreamConfig  # noqa: E402
from svlm_ros.engine.context import Context  # noqa: E402
from svlm_ros.engine.model import load_model, Model  # noqa: E402
from svlm_ros.engine.stream import Stream  # noqa: E402
from svlm_ros.engine.updates import Description  # noqa: E402

TOLERANCE = 2e-4
FIRST_SPECIAL, END_OF_TURN = 151643, 151645
ROUND_NS = 1_000_000_000


def synthetic_frames(seed: int, chunk: int, count: int, height: int, width: int) -> np.ndarray:
    """Return the frames of a round that the traces were made with, uint8 [count, 3, h, w].

    The top byte of splitmix64 over a counter that begins at seed * 2^40 + chunk * 2^24 + 1.
    """
    total = count * 3 * height * width
    with np.errstate(over='ignore'):
        start = np.uint64((seed << 40) + (chunk << 24) + 1)
        z = (np.arange(total, dtype=np.uint64) + start) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(56)).astype(np.uint8).reshape(count, 3, height, width)


@dataclass
class Outcome:
    """What one case showed. `mismatches` are of what must be exact."""

    rounds: int = 0
    tokens: int = 0
    deviation: float = 0.0
    mismatches: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether everything exact was equal, and all logits within the tolerance."""
        return self.rounds > 0 and not self.mismatches and self.deviation <= TOLERANCE


class Replay:
    """Runs one case through a stream in reference mode and compares as it goes."""

    def __init__(self, model: Model, case: dict[str, Any], trace: Any) -> None:
        self.case, self.trace = case, trace
        self.outcome = Outcome()
        self.round = self.step = self.prefilled = 0
        self.stream: Stream = model.open_stream('golden', stream_config(case), self.choose)
        prefill = self.stream._prefill

        def recorded(slots: np.ndarray, positions: np.ndarray,
                     pending: np.ndarray) -> torch.Tensor:
            self.prefilled = len(pending)
            self.exact('prefill is the end of the sequence', pending,
                       np.arange(len(slots) - len(pending), len(slots)))
            return prefill(slots, positions, pending)

        self.stream._prefill = recorded     # type: ignore[method-assign]

    @property
    def context(self) -> Context:
        """The stream's retained sequence."""
        return self.stream.context

    def run(self) -> Outcome:
        """Run all rounds."""
        case = self.case
        for self.round in range(case['rounds']):
            self.step = 0
            frames = synthetic_frames(case['seed'], self.round, case['fps'], case['height'],
                                      case['width'])
            self.check_frames(frames)
            replies = []
            for k, frame in enumerate(frames):
                stamp = self.round * ROUND_NS + k * ROUND_NS // case['fps']
                updates = self.stream.push(np.ascontiguousarray(frame.transpose(1, 2, 0)), stamp)
                replies += [u for u in updates if isinstance(u, Description)]
            self.exact('one description', len(replies), 1)
            self.exact('new_ids', replies[0].token_ids, self.traced('new_ids'))
            self.check_cache()
            self.outcome.rounds += 1
        return self.outcome

    def choose(self, logits: torch.Tensor, _: Any) -> int:
        """Compare what the engine knows before a token with the trace, then choose as planned."""
        if self.step == 0:
            ids = np.array(self.context.ids())
            self.exact('ids', ids, self.traced('ids'))
            self.exact('positions', self.context.positions(), self.traced('pos'))
            self.exact('past_len', len(ids) - self.prefilled, int(self.traced('past_len')))
        elif self.step - 1 < self.traced('new_pos').shape[1]:
            self.exact('new_pos', self.context.positions()[:, -1],
                       self.traced('new_pos')[:, self.step - 1])
        if self.step < len(self.traced('logits_sub')):
            self.close(logits[self.case['logit_ids']], self.traced('logits_sub')[self.step])
            if 'r000_top_ids' in self.trace:
                self.close(logits[self.traced('top_ids')[self.step]],
                           self.traced('top_logits')[self.step])
                self.close(logits.double().logsumexp(-1), self.traced('lse')[self.step])
        plan = self.case['plan'][self.round]
        if plan['mode'] == 'forced':
            token = plan['ids'][self.step]
        elif self.step == plan.get('eos_at'):
            token = END_OF_TURN
        else:
            token = int(logits[:FIRST_SPECIAL].argmax())
        self.step += 1
        self.outcome.tokens += 1
        return token

    def check_frames(self, frames: np.ndarray) -> None:
        """Make sure that the model sees what it saw when the trace was made."""
        expected = self.case['rounds_info'][self.round].get('frames_sha256')
        if expected is not None:
            self.exact('frames', hashlib.sha256(frames.tobytes()).hexdigest(), expected)

    def check_cache(self) -> None:
        """Compare raw keys and values, in sequence order, where the trace has them."""
        if f'r{self.round:03}_k_raw' not in self.trace:
            return
        slots = self.context.slots()
        slots, cache = slots[self.context.written[slots]], self.stream._cache
        self.close(cache.raw_keys.cpu()[:, :, slots], self.traced('k_raw'))
        self.close(cache.values.cpu()[:, :, slots], self.traced('v'))

    def traced(self, name: str) -> np.ndarray:
        """Return an array of this round's trace."""
        return self.trace[f'r{self.round:03}_{name}']

    def exact(self, what: str, got: Any, expected: Any) -> None:
        """Note a mismatch of something that must be equal."""
        if not np.array_equal(np.asarray(got), np.asarray(expected)):
            self.outcome.mismatches.append(f'round {self.round}: {what}')

    def close(self, got: torch.Tensor, expected: np.ndarray) -> None:
        """Note the largest deviation; a NaN or another shape is a mismatch."""
        expected = np.asarray(expected)
        if tuple(got.shape) != expected.shape:
            self.outcome.mismatches.append(
                f'round {self.round}: shape {tuple(got.shape)}, expected {expected.shape}')
            return
        worst = float(np.abs(got.double().cpu().numpy() - expected).max())
        if np.isnan(worst):
            self.outcome.mismatches.append(f'round {self.round}: NaN')
        self.outcome.deviation = max(self.outcome.deviation, worst)


def stream_config(case: dict[str, Any]) -> StreamConfig:
    """Return the settings of a case, in the engine's terms."""
    sink, window = case.get('text_sink'), case.get('text_sliding_window')
    if window is None and sink is not None:
        window = 1      # the reference keeps window - 1 tokens of the end: none
    return StreamConfig(
        reference=True, instruction=case.get('query') or '',
        previous_text=case.get('previous_text') or '', frame_rate_hz=float(case['fps']),
        vision_rounds=case['visual_round'], text_rounds=case['text_round'],
        text_sink=sink or 0, text_window=window,
        max_new_tokens=case.get('max_new_tokens', 20), min_pixels=28 * 28,
        max_pixels=max(case['height'] * case['width'], 28 * 28),
        time_offset_sec=float(case.get('skip_first_chunk') or 0))


def check_case(model: Model, folder: Path, name: str) -> Outcome:
    """Run one case."""
    case = json.loads((folder / f'{name}.json').read_text())
    with np.load(folder / f'{name}.npz') as trace:
        return Replay(model, case, dict(trace)).run()


def unpacked_model(folder: Path, scratch: Path) -> Path:
    """Return a folder that holds model.safetensors, unpacked where it is shipped compressed."""
    packed = folder / 'model.safetensors.xz'
    if not packed.exists():
        return folder
    target = scratch / 'model'
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns('*.xz'))
    (target / 'model.safetensors').write_bytes(lzma.decompress(packed.read_bytes()))
    return target


def find_tokenizer(folder: Path, scratch: Path) -> Path:
    """Return where the Qwen2.5 tokenizer is: beside the traces, or the copy in test/data."""
    for place in (folder, folder / 'tokenizer', folder.parent / 'models' / 'qwen2_5_vl_7b'):
        if (place / 'vocab.json').exists():
            return place
    with tarfile.open(HERE / 'data' / 'qwen2_5_tokenizer.tar.xz') as archive:
        # Python before 3.11.4 has no filters; the archive is this repository's own.
        safely = {'filter': 'data'} if hasattr(tarfile, 'data_filter') else {}
        archive.extractall(scratch / 'tokenizer', **safely)     # type: ignore[arg-type]
    return scratch / 'tokenizer'


def load_traced_model(folder: Path, model: Path | None = None, tokenizer: Path | None = None,
                      device: str = 'cpu') -> Model:
    """Load the model that a folder of traces was made with, in float32."""
    with tempfile.TemporaryDirectory() as scratch:
        return load_model(
            str(unpacked_model(model or folder / 'tiny_model', Path(scratch))), device, 'float32',
            str(tokenizer or find_tokenizer(folder, Path(scratch))))


def main() -> int:
    """Check a folder of traces from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('folder', type=Path, metavar='DIR')
    parser.add_argument('--model', type=Path, help='the traced model (default: DIR/tiny_model)')
    parser.add_argument('--tokenizer', type=Path)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('cases', nargs='*', metavar='CASE', help='names (default: all)')
    arguments = parser.parse_intermixed_args()      # cases may follow --model
    folder = arguments.folder
    names = arguments.cases or sorted(
        path.stem for path in folder.glob('*.json') if path.with_suffix('.npz').exists())
    if not names:
        raise SystemExit(f'no traces (<case>.json with <case>.npz) in {folder}')
    model = load_traced_model(folder, arguments.model, arguments.tokenizer,
                              arguments.device)
    failed = 0
    for name in names:
        outcome = check_case(model, folder, name)
        failed += not outcome.passed
        print(f'{name:24} {"ok    " if outcome.passed else "FAILED"} {outcome.rounds:4} rounds '
              f'{outcome.tokens:5} tokens  largest deviation {outcome.deviation:.2e}'
              + ''.join(f'\n    {line}' for line in outcome.mismatches[:10]), flush=True)
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
