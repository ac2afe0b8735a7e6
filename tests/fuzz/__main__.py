"""Try damaged files and command lines: `python -m shoestring.tests.fuzz --each 200`; see `command.py`."""

import os
import sys

from .lines import Lines

if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    counted = Lines()
    counted.install()

    from .command import main  # it imports the readers, whose lines count from the import on

    sys.exit(main(counted))
