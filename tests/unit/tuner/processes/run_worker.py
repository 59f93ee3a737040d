"""The real worker with the fake trainer."""

import sys
from pathlib import Path

from tuner.worker import main

if __name__ == "__main__":
    fake = str(Path(__file__).with_name("fake_trainer.py"))
    sys.exit(main(sys.argv[1:], (sys.executable, "-I", fake)))
