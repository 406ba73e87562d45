"""A page to click: pictures, phrases and boxes in, the mask token by token out; see __main__.py."""
