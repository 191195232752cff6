"""The explorer: which pages there are. Nothing else happens here.

    streamlit run app/main.py
"""

from __future__ import annotations

import streamlit as st

st.set_page_config(page_title="LoopScope", page_icon=":material/all_inclusive:", layout="wide",
                   initial_sidebar_state="expanded")
page = st.navigation([
    st.Page("pages/verdict.py", title="Verdict", icon=":material/gavel:", default=True),
    st.Page("pages/lens.py", title="Lens", icon=":material/search:"),
    st.Page("pages/dynamics.py", title="Dynamics", icon=":material/timeline:"),
    st.Page("pages/attention.py", title="Attention", icon=":material/hub:"),
    st.Page("pages/probes.py", title="Probes", icon=":material/science:"),
    st.Page("pages/denoise.py", title="Denoise", icon=":material/blur_on:"),
])
page.run()
