"""Scenes per second on one core: `python benchmarks/scenes.py [--sizes 64 128 256] [--seconds 3]`.

Prints one line a size: MaskRecords and ChatRecords per CPU second of one process, and their ratio to the
target of 100 a second at 128 pixels.
"""

import argparse
import time

from alto_jax.data.scenes import SceneChats, SceneMasks, ScenesConfig

TARGET = 100.0


def rate(source, seconds: float) -> float:
    """Records per CPU second, after a warm-up that fills the sprite caches."""
    for index in range(300):
        source[-1 - index]
    start, count = time.process_time(), 0
    while time.process_time() - start < seconds:
        source[count % (len(source) - 300)]
        count += 1
    return count / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seconds", type=float, default=3.0, help="CPU seconds for each figure")
    args = parser.parse_args()
    for size in args.sizes:
        config = ScenesConfig(image_size=size, num_scenes=20_000)
        masks, chats = rate(SceneMasks(config), args.seconds), rate(SceneChats(config), args.seconds)
        print(f"{size:4d} px: {masks:7.1f} masks/s, {chats:7.1f} chats/s, {masks / TARGET:5.2f} x the target")


if __name__ == "__main__":
    main()
