"""``python -m trivmm`` is ``trivmm``."""

from trivmm.cli import main

raise SystemExit(main())
