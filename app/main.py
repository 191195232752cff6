"""The explorer: which pages there are. Nothing else happens here.

They live in views/, not pages/: a folder of that name would make Streamlit serve them by its older
scheme, without this file, to whoever opens a link before anyone has opened the first page.

    streamlit run app/main.py
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

st.set_page_config(page_title="LoopScope", page_icon=str(Path(__file__).with_name("icon.svg")), layout="wide",
                   initial_sidebar_state="expanded")
page = st.navigation([
    st.Page("views/verdict.py", title="Verdict", icon=":material/gavel:", default=True),
    st.Page("views/lens.py", title="Lens", icon=":material/search:"),
    st.Page("views/dynamics.py", title="Dynamics", icon=":material/timeline:"),
    st.Page("views/attention.py", title="Attention", icon=":material/hub:"),
    st.Page("views/probes.py", title="Probes", icon=":material/science:"),
    st.Page("views/denoise.py", title="Denoise", icon=":material/blur_on:"),
    st.Page("views/training.py", title="Training", icon=":material/show_chart:"),
])
page.run()
