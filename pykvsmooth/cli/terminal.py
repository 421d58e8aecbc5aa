"""What the command line knows about the terminal. Rich does colours, widths and bars; ours is how text is made safe to show."""

from __future__ import annotations

import errno
import io
import os
import shutil
import sys
from typing import TextIO

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from .escape import escaped, one_line


class _Closed(io.StringIO):
    """Stands for a standard output that the shell closed (>&-): what is written there would be lost."""

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, "is closed", "standard output")


def replace_closed_streams() -> None:
    """Python has None where the shell closed a stream: rich and argparse would put errors on standard output; print() loses its text."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  as long as the process
    if sys.stdout is None:
        sys.stdout = _Closed()


class Screen(Console):
    """One of the two output streams. Whether it is a terminal is the stream's word alone: FORCE_COLOR puts no codes into a pipe."""

    def __init__(self, stream: TextIO) -> None:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        super().__init__(file=stream, force_terminal=stream.isatty(), markup=False, highlight=False, emoji=False)
        if not self.width:  # COLUMNS=0, from a terminal that does not know it
            self.width = shutil.get_terminal_size().columns

    @property
    def colour(self) -> bool:
        return self.color_system is not None and not self.no_color

    def write(self, text: str) -> None:
        """Text as it is. print() would expand tabs and drop control characters, also in a pipe."""
        self.file.write(text)
        self.file.flush()

    def safe(self, text: str) -> str:
        """On a terminal control characters are shown, not obeyed; a pipe gets what there is."""
        return escaped(text) if self.is_terminal else text

    def show_cursor(self, show: bool = True) -> bool:
        """Rich hides the cursor while a bar is shown. We don't: a process that is killed could not show it again."""
        return False

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit; main() has the exit code


class Ui:
    """Both streams, the line that shows what is being waited for, and messages."""

    def __init__(self, quiet: bool = False) -> None:
        self.out, self.err = Screen(sys.stdout), Screen(sys.stderr)
        self.quiet = quiet
        self._spinner = self._progress(SpinnerColumn("line"))
        whole = Column(no_wrap=True)  # so that a narrow terminal gets a shorter bar
        self._bar = self._progress(BarColumn(12), MofNCompleteColumn("/", whole), TimeRemainingColumn(True, table_column=whole))

    def _progress(self, *columns: ProgressColumn) -> Progress:
        progress = Progress(
            *columns,
            TextColumn("{task.description}", style="dim", markup=False),
            console=self.err,
            transient=True,
            refresh_per_second=5,
            speed_estimate_period=1e9,  # a picture may take minutes
        )
        progress.add_task("")
        return progress

    def status(self, text: str, done: int | None = None, total: int | None = None) -> None:
        """Shows one line until clear(), with a bar if a total is given. Nothing on a pipe, nothing with --quiet."""
        if not self.quiet and self.err.is_interactive:
            shown = self._spinner if total is None else self._bar
            shown.update(TaskID(0), description=one_line(text), completed=done, total=total)
            shown.start()

    def clear(self) -> None:
        for shown in (self._spinner, self._bar):
            if shown.live.is_started:
                shown.stop()

    def put(self, text: str, style: str = "") -> None:
        """To standard output, at once. Lines are broken by the terminal, not here."""
        self.clear()  # also if this is a pipe: to a cat, perhaps, on the same terminal
        if style:
            self.out.out(text, style=style, end="")
        else:
            self.out.write(text)

    def note(self, text: str | Text, style: str = "dim") -> None:
        """A line for people, on standard error, above a bar; not with --quiet."""
        if not self.quiet:
            self.err.print(escaped(text) if isinstance(text, str) else text, style=style, soft_wrap=not self.err.is_terminal)

    def error(self, text: object) -> None:
        self.err.print(Text.assemble(("error:", "red"), " ", one_line(str(text))), soft_wrap=True)


def bytes_text(n: float) -> str:
    unit, suffix = pick_unit_and_suffix(int(n), ["B", "KiB", "MiB", "GiB"], 1024)
    return f"{n / unit:.{1 if unit > 1 else 0}f} {suffix}"
