"""Refused: why a request gets no answer, in the form of OpenAI's errors."""

from __future__ import annotations


class Refused(Exception):
    """A request that is not answered; its text is a sentence for whoever sent it.

    Args:
        message: what came and what was expected.
        status: of the HTTP response.
        param: the field that does not fit, or None.
        code: a name for programs, or None.
        kind: OpenAI's type of error; None is that of the status.
        retry_after: seconds after which the request may be sent again, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def to_dict(self) -> dict:
        """The body of the response."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}
