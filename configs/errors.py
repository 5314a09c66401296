"""The one exception type for mistakes that a user can repair."""


class UserError(Exception):
    """A mistake in a user's settings, data or command.

    The message names the file, line or field and says what to change. Scripts print it without a traceback and exit
    with status 2; everything else that is raised is a defect of ours and keeps its traceback.
    """

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback; a notebook stops at the cell all the same."""
        return [f"error: {self}"]
