"""The declarations of kvs.h for cffi: the text between its [cffi] marks.

As a program, `python _cdef.py kvs.h _kvs_cffi.py`, it writes them parsed (cffi's out-of-line ABI mode), as the build of a wheel does:
parsing costs a good part of the time of an import.
"""

from __future__ import annotations

import sys
from pathlib import Path


def declarations(header: Path) -> str:
    text = header.read_text(encoding="utf-8")
    begin = text.index("*/", text.index("[cffi]")) + 2
    return text[begin : text.rindex("/*", 0, text.index("[cffi] end"))]


def main(header: str, out: str) -> None:
    import cffi

    ffi = cffi.FFI()
    ffi.cdef(declarations(Path(header)))
    ffi.set_source(f"pykvsmooth.{Path(out).stem}", None)
    ffi.emit_python_code(out)


if __name__ == "__main__":
    main(*sys.argv[1:3])
