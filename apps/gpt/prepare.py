"""The command of ``apps.gpt.data.prepare``, which makes text into token shards.

python -m apps.gpt.prepare --help
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from apps.gpt.data.prepare import main

if __name__ == "__main__":
    sys.exit(main())
