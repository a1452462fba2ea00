"""`python -m launch` is `podwright`, for a checkout that isn't installed."""

import sys

from launch.cli import main

sys.exit(main())
