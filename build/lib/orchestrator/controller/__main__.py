"""`python -m orchestrator.controller`."""

import sys

from orchestrator.controller.program import main

sys.exit(main())
