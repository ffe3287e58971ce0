"""A live view of a search's front in the terminal."""

import time
from collections.abc import Callable

from peftscape.analysis.states import counted
from peftscape.analysis.study import Study
from peftscape.analysis.table import front_table


def watch(read: Callable[[], Study], *, every: float = 2.0, rounds: int | None = None) -> None:
    """Shows the front and what the trials are doing, anew every `every` seconds, until interrupted.

    Args:
        read: loads the study; an error in one round (a file being written) is shown, and the next tries again.
        rounds: stop after so many; None goes on until Ctrl-C.
    """
    from rich.console import Console, Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    def view() -> RenderableType:
        try:
            study = read()
            said = counted(study.records) or "no trial yet"
            return Group(front_table(study), Text(f"{said}; {time.strftime('%H:%M:%S')}; Ctrl-C ends the view"))
        except (ValueError, OSError) as error:
            return Text(f"{error}")

    try:
        with Live(view(), console=Console(), auto_refresh=False, screen=False) as live:
            done = 1
            while rounds is None or done < rounds:
                time.sleep(every)
                live.update(view(), refresh=True)
                done += 1
    except KeyboardInterrupt:
        pass
