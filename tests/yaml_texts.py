"""Texts that look like something else in YAML."""

from hypothesis import strategies as st

# Surrogates can't be written as UTF-8.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ["1e-5", "1", "010", "0x1f", "true", "no", "null", "~", "", "a: b", "- a", "#", ".inf", "1:30"]
)
