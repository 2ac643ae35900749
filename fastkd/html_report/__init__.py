"""report.html: a page that shows a run, without a network and without scripts.

page.py        what the page says, and its file
compare.py     the pass over the validation images: predictions, and the images that the networks see most differently
charts.py      the curves: lines and ticks in the coordinates of a drawing
confusion.py   the confusion matrix and the pairs of classes that are taken for one another
pictures.py    pixels as pictures inside a page
page.html      the template, which escapes all that it is given; style.css
"""
