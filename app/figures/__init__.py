"""Draw: pure functions from labelled arrays to plotly figures. Nothing here loads, computes or knows streamlit."""
