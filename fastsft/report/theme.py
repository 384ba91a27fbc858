"""Hold the colours of the charts, light and dark; the page's CSS uses the same two signs.

Blue helps, orange harms: told apart by every common colour blindness, and by lightness in print.
"""

from __future__ import annotations

from typing import Any

HELPS, HARMS, NEUTRAL = "#3f7fbf", "#d9782d", "#8f959e"
# Okabe and Ito's order where lightness allows, then six more: a run may have twelve sources, and "all others"
_LIGHT = (
    "#00699e #b8860b #008a66 #b0578d #4aa3d8 #b34700 #6b6b6b #7a5fb0 #8a9a1f #a03a4a #1f7a8c #9c755f #8f959e"
).split()
_DARK = (
    "#4aa8e0 #e3b34a #35c49a #dd8fbf #9ad3f5 #f08a4b #b5b5b5 #b39ee6 #c4d256 #e0808d #5fc3d6 #cda58f #8f959e"
).split()
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"


def config(*, dark: bool = False, font: str = FONT) -> dict[str, Any]:
    """Give the Vega-Lite config of one colour scheme."""
    ink, faint, line = ("#d8dade", "#a3a8b0", "#33373d") if dark else ("#24272b", "#62676e", "#e3e1dc")
    axis = {"labelColor": faint, "titleColor": faint, "gridColor": line, "domainColor": line, "tickColor": line}
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": {**axis, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 130},
        "axisY": {"domain": False, "ticks": False, "labelPadding": 6},
        "legend": {
            "labelColor": ink,
            "titleColor": faint,
            "titleFontWeight": "normal",
            "labelFontSize": 12,
            "labelLimit": 170,
        },
        "title": {"color": ink, "fontWeight": "normal", "fontSize": 13},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": faint},
        "tick": {"color": ink},
        "point": {"filled": True, "size": 46},
        "range": {"category": _DARK if dark else _LIGHT},
    }
