"""`python -m fmsam_lib.study NAME` computes a whole study."""

import sys

from fmsam_lib.study.run import main

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
