"""Print a resolved run with its parameter counts, memory per rank, steps, samples and operations.

python -m d2v2ds.config audio_large optim.clip_norm=0.5 [--world 64]
"""

import argparse
import sys

from d2v2ds.config.load import load_config, to_yaml
from d2v2ds.config.summary import batch_advice, summary
from d2v2ds.errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m d2v2ds.config", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="name in d2v2ds/configs or path of a YAML file")
    parser.add_argument("--world", type=int, default=1, help="ranks, for the memory of one (1)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value")
    options = parser.parse_intermixed_args(arguments)
    if options.world < 1:
        parser.error(f"--world {options.world}: expected 1 rank or more")
    try:
        config = load_config(options.config, options.overrides)
        lines = summary(config, options.world) + batch_advice(options.config, config)
    except (ConfigError, ValueError) as error:  # ValueError: masks that cannot be drawn
        print(error, file=sys.stderr)
        return ConfigError.exit_code
    print(to_yaml(config), end="")
    print("\n".join(f"# {line}" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
