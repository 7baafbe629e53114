"""Texts that a model may write to break out of a page, or just to break it."""

MARK = "owned"
TEXTS = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\"><svg onload=\"document.title='owned'\">",
    "<a href=\"javascript:document.title='owned'\">click</a> javascript:alert(1)",
    "]]> --> <!-- <![CDATA[ {{7*7}} {% raw %} ${7*7} &lt;b&gt; &amp; </pre></div></body></html>",
    "\u202egnp.exe\u202c \u2066isolate\u2069 \u2028line\u2029paragraph \x00nul \x1b[31mred \ud800 lone \ufeff",
    "x" * 200_000,
    "<meta http-equiv=refresh content='0;url=https://example.org/'><base href=https://example.org/>",
    "\\u003c/script\\u003e \"quotes\" 'and' `ticks` \\",
    "<img src=x onerror=\"document.title='owned'\"> " + "a long thought " * 200,
    "",
)
