"""`python -m llama2`, also for torchrun."""

import sys

from llama2.cli import main

sys.exit(main())
