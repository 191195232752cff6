"""Start the explorer from wherever it is installed; arguments are those of ``streamlit run``.

    python -m app --server.port 8502
"""

from __future__ import annotations

import sys
from pathlib import Path

from streamlit.web import cli

if __name__ == "__main__":
    sys.argv = ["streamlit", "run", str(Path(__file__).with_name("main.py")), *sys.argv[1:]]
    sys.exit(cli.main())
