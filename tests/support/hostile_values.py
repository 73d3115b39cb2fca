"""Values that do not belong where they stand: paths, code, control characters, numbers without bounds."""

from hypothesis import strategies as st

from support.hostile_watch import PLANTED


TEXTS = [
    "",
    "../../../etc/passwd",
    "/etc/passwd",
    "..",
    "~/.ssh/id_rsa",
    "\0",
    "a\0b",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "\ud800",
    "ſ" * 3,
    "a" * 10_000,
    "__class__",
    "__reduce__",
    "{0.__class__}",
    "%s%s%n",
    "${HOME}",
    "$(touch /tmp/x)",
    "os.system",
    PLANTED,
    f"{PLANTED}.Planted",
    "file:///etc/passwd",
    "http://127.0.0.1:9/x",
    "nul",
    "None",
    "default",
    "LORA",
]
NUMBERS = [
    0,
    -1,
    1,
    2,
    3,
    31,
    33,
    2**31,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    10**18,
    10**30,
    -(2**63),
    0.5,
    1e-320,
    1e308,
    -0.0,
]
WEIRD = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(TEXTS),
    st.integers(),
    st.text(max_size=6),
)
VALUES = st.one_of(
    WEIRD,
    st.lists(WEIRD, max_size=4),
    st.lists(st.lists(st.integers(-1, 6), max_size=4), max_size=4),
    st.dictionaries(st.one_of(st.sampled_from(TEXTS), st.sampled_from(["0", "1", "-1"])), WEIRD, max_size=3),
)
