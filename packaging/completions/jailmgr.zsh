#compdef jailmgr

_jailmgr_jails() {
    local -a jails tenant
    [[ -n ${opt_args[--tenant]} ]] && tenant=(--tenant ${opt_args[--tenant]})
    jails=(${${${(f)"$(_call_program jails jailmgr $tenant list --format csv 2>/dev/null)"}[2,-1]}%%,*})
    compadd "$@" -a jails
}

_jailmgr_paths() {
    compset -P '*:' || { _jailmgr_jails -S : -q; _files }
}

_jailmgr_directories() {
    _files -/
}

_jailmgr_templates() {
    local -a templates=(@TEMPLATES@ /etc/jailmgr/templates/*(N-/:t))
    compadd -a templates
}

_jailmgr_keys() {
    local -a keys=(@KEYS@)
    compadd "$@" -a keys
}

_jailmgr_pairs() {
    compset -P '*=' || _jailmgr_keys -S = -q
}

@TABLE@

_jailmgr "$@"
