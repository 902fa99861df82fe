"""Make the fields of a shallow-water simulation: the command of ``apps.vit.data.simulate``.

python -m apps.vit.simulate --help
"""

import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file, not as a module
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from apps.vit.data.simulate import main

if __name__ == "__main__":
    sys.exit(main())
