"""Time per round and memory over thousands of rounds, streaming beside what it replaces.

    python bench/engine_rounds.py [--rounds 2000] [--device cpu] [--json FILE]

A small model with random weights reads two 224 x 224 frames per round and says 8 tokens. Every
policy runs in a process of its own, in the same order of frames. Baselines: `full` keeps
everything (what a plain VLM does; it runs until its cache is full), `recompute` retains the same
tokens as `streaming` but computes their states anew each round (a sliding window with overlap).

`early` is the second tenth of the rounds, `late` the last one. Memory is the process's resident
set; `trimmed` is after malloc_trim, when the C library has given back what it holds free.

Prediction before measuring: `streaming` flat in time and memory once previous text is full (about
round 150); `recompute` flat, several times slower, since it computes about 2,700 states per round
instead of 100; `full` grows until it breaks at 32,768 tokens, after about 320 rounds.
"""
import argparse
import ctypes
import json
import os
from pathlib import Path
import platform
import subprocess
import sys
import time
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
POLICIES = ('streaming', 'recompute', 'full')
RATIO = 10      # the baselines run a tenth of the rounds: they are slow, and show it at once


def measure(policy: str, rounds: int, device: str) -> dict[str, Any]:
    """Run one policy; return its figures."""
    import numpy as np
    import psutil
    import torch

    from svlm_ros.engine.config import StreamConfig
    from svlm_ros.engine.model import load_model
    from svlm_ros.engine.rounds import Round
    from svlm_ros.engine.updates import EngineError, Frame

    model = load_model('random', device)
    stream = model.open_stream('bench', StreamConfig(
        policy=policy, max_new_tokens=8, max_pixels=224 * 224))     # type: ignore[arg-type]
    pictures = np.random.default_rng(0).integers(0, 256, (64, 224, 224, 3), dtype=np.uint8)
    process, seconds, resident, used = psutil.Process(), [], [], []
    stopped = ''
    for index in range(rounds):
        frames = tuple(Frame(pictures[(2 * index + k) % 64], index * 10 ** 9 + k * 5 * 10 ** 8)
                       for k in range(2))
        begin = time.perf_counter()
        try:
            for _ in stream.describe(Round(index, frames)):
                pass
        except EngineError as error:
            stopped = f'round {index}: {error}'
            break
        if model.device.type == 'cuda':
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        resident.append(process.memory_info().rss)
        used.append(stream.cache_used)
    tenth = max(len(seconds) // 10, 1)
    early, late = seconds[tenth:2 * tenth], seconds[-tenth:]
    resident.append(process.memory_info().rss)
    if sys.platform == 'linux':
        ctypes.CDLL(None).malloc_trim(0)

    def ms(values: list[float], share: float) -> float:
        return round(float(np.quantile(values, share)) * 1e3, 1)

    def mib(size: int) -> float:
        return round(size / 2 ** 20, 1)

    return {
        'policy': policy, 'rounds': len(seconds), 'early_ms': ms(early, 0.5),
        'late_ms': ms(late, 0.5), 'late_p99_ms': ms(late, 0.99), 'tokens_retained': used[-1],
        'cache_mib': mib(model.info.cache_bytes), 'early_mib': mib(resident[tenth]),
        'late_mib': mib(resident[-1]), 'trimmed_mib': mib(process.memory_info().rss),
        'stopped': stopped}


def main() -> None:
    """Run every policy and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rounds', type=int, default=2000)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--json', type=Path)
    parser.add_argument('--policy', choices=POLICIES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.policy:
        print(json.dumps(measure(arguments.policy, arguments.rounds, arguments.device)))
        return
    import torch
    machine = (f'{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, '
               f'device {arguments.device}')
    print(machine)
    columns = ('policy', 'rounds', 'early_ms', 'late_ms', 'late_p99_ms', 'tokens_retained',
               'cache_mib', 'early_mib', 'late_mib', 'trimmed_mib')
    print('  '.join(columns))
    results = []
    for policy in POLICIES:
        rounds = arguments.rounds if policy == 'streaming' else arguments.rounds // RATIO
        rounds = max(rounds, 400) if policy == 'full' and arguments.rounds >= 2000 else rounds
        output = subprocess.run(
            [sys.executable, __file__, '--policy', policy, '--rounds', str(rounds), '--device',
             arguments.device], check=True, capture_output=True, text=True)
        results.append(json.loads(output.stdout.splitlines()[-1]))
        print('  '.join(f'{results[-1][column]!s:>{len(column)}}' for column in columns),
              flush=True)
        if results[-1]['stopped']:
            print(f'    {policy} broke in {results[-1]["stopped"]}')
    if arguments.json:
        arguments.json.write_text(json.dumps({'machine': machine, 'results': results}, indent=1))


if __name__ == '__main__':
    main()
