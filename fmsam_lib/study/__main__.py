"""`python -m fmsam_lib.study NAME` computes a whole study."""

import locale
import os
import signal
import sys

if sys.platform == "win32":
    sys.exit("error: a study needs Linux or macOS; on Windows, use WSL. Notebooks and fmsam-register do without it")
# In another locale than UTF-8 it starts again: names of files, too, must be text to all alike.
if __name__ == "__main__" and locale.getpreferredencoding(False).lower() != "utf-8":
    again = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
    os.execve(sys.executable, again, os.environ | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:replace"})

from fmsam_lib.study.run import main

if __name__ == "__main__":
    for sign in (signal.SIGTERM, signal.SIGINT):  # which a shell's `&` has its children ignore
        signal.signal(sign, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
