"""The words of the output format: where reasoning opens and closes, and how an answer says accept or decline."""

from pydantic import BaseModel, ConfigDict


class Tags(BaseModel):
    """Delimiters of one output format. Scratchpads and published formats differ only in these four strings."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    open_think: str = "<think>"
    """Opens the reasoning."""
    close_think: str = "</think>"
    """Closes the reasoning; the answer follows."""
    accept: str = "<accept/>"
    """First words of an answer that does what the request asks."""
    decline: str = "<decline/>"
    """First words of an answer that does not."""


PRESETS = {
    "think": Tags(),
    "scratchpad": Tags(open_think="<SCRATCHPAD_REASONING>", close_think="</SCRATCHPAD_REASONING>"),
    # The tag format of the published alignment-faking experiments (Greenblatt et al., 2024).
    "published": Tags(
        open_think="<SCRATCHPAD_REASONING>",
        close_think="</SCRATCHPAD_REASONING>",
        accept="<request_fully_accepted/>",
        decline="<rejected/>",
    ),
}
