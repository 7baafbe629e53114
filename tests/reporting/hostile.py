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
    "<svg/onload=document.title='owned'><iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<a href=data:text/html,<script>document.title='owned'</script>>x</a> <form "
    "action=javascript:document.title='owned'>",
    "<math><mtext></p><style><!--</style><img title=\"--><img src=x onerror=document.title='owned'>\">",
    "</title></textarea></noscript></template><script>document.title='owned'</script><!--<script>",
    "`${document.title='owned'}` ${constructor.constructor(\"document.title='owned'\")()} "
    "{{constructor.constructor(1)()}}",
    "</style><style>body{display:none} @import 'https://example.org/x.css'; *{background:url(https://example.org/)}",
    "\\href{javascript:document.title='owned'}{x} $$\\text{<img src=x onerror=document.title='owned'>}$$ "
    "\\(\\require{html}\\)",
    "</script\u2028> \u2029<script>\u0085document.title='owned' \U000e0001 \u061c \u2067 \ufeff",
    "\x1b]0;owned\x07 \x1b[2J\x1b[8m \x1b]8;;javascript:1\x1b\\link\x1b]8;;\x1b\\ \x9b31m \x9d0;owned\x9c \r\x08\x7f",
    "| a | b |\n|---|---|\n```\n[x](javascript:alert(1)) ![x](https://example.org/x.png) `x` <b>\n# head\n$x$",
    "\\input{/etc/passwd} \\write18{touch canary} \\immediate\\write18 {x} & % $ # _ { } ~ ^ \\\\ ^^5cinput *[1ex] --",
    "__proto__ constructor toString",
)
FIRST_NEW = 10  # From here on, every text is short.
