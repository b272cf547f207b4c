// Formulas of the site: $…$ in a line, \[…\] in a paragraph of its own (docs/site_pages.py makes those).
window.MathJax = {tex: {inlineMath: [["$", "$"]]}};
