"""app: the explorer. load (data) → compute (compute) → draw (figures), shown by the pages.

    streamlit run app/main.py
"""
