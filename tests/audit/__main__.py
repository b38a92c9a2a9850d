"""``python tests/audit``: run every malformed input in one process, and print a table.

Words on the command line select the cases whose description contains one of them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from judge import import_all, judge, limit_memory, table
from malformed import cases, make_shared


def main() -> int:
    limit_memory()
    import_all()
    verdicts = []
    chosen = [c for c in cases() if not sys.argv[1:] or any(w in str(c) for w in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_shared(root / "shared")
        for case in chosen:
            verdicts.append(judge(case, root))
            if verdicts[-1].problem:
                print(f"{ascii(str(case))[1:-1]}\n    {verdicts[-1].problem!a}", flush=True)
    print(table(verdicts))
    return 1 if any(v.problem for v in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
