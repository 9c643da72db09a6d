# bash completion for jailmgr(1)

@TABLE@

_jailmgr_jails() {
    jailmgr ${tenant:+--tenant "$tenant"} list --format csv 2>/dev/null | sed -e 1d -e 's/,.*//'
}

_jailmgr() {
    local IFS=$' \t\n' line=${COMP_LINE:0:COMP_POINT}
    local current word name='' option='' tenant='' kind='' place=0 words=() found=()
    local commands options valued places
    COMPREPLY=()
    # COMP_WORDS is cut at `=` and `:`, which are parts of words here.
    read -ra words <<<"$line"
    [[ $line == *[[:space:]] ]] && words+=('')
    current=${words[-1]}
    words=("${words[@]:1:${#words[@]}-2}")
    _jailmgr_table ''
    for word in "${words[@]}"; do
        if [[ $option ]]; then
            [[ $option == --tenant ]] && tenant=$word
            option=''
        elif [[ $word == -- ]]; then
            return
        elif [[ " ${valued[*]} " == *" $word "* ]]; then
            option=$word
        elif [[ " ${commands[*]} " == *" $word "* ]]; then
            name+=${name:+ }$word
            _jailmgr_table "$name"
        elif [[ $word != -* ]]; then
            place=$((place + 1))
        fi
    done
    if [[ ! $option && $current == --*=* ]]; then
        option=${current%%=*}
        current=${current#*=}
    fi
    if [[ $option ]]; then
        case $option in
            --format) found=(@FORMATS@) ;;
            --root) kind=directories ;;
            -c) kind=keys= ;;
        esac
    elif [[ $current == -* ]]; then
        found=("${options[@]}")
    elif [[ ${#commands[@]} -gt 0 ]]; then
        found=("${commands[@]}")
    else
        [[ $place -lt ${#places[@]} ]] || place=$((${#places[@]} - 1))
        [[ $place -lt 0 ]] || kind=${places[place]}
    fi
    case $kind in
        jails) found=($(_jailmgr_jails)) ;;
        paths)
            compopt -o default
            [[ $current == *[:/]* ]] || found=($(_jailmgr_jails | sed 's/$/:/'))
            compopt -o nospace
            ;;
        directories) compopt -o dirnames ;;
        templates) found=(@TEMPLATES@ $(cd /etc/jailmgr/templates 2>/dev/null && echo *)) ;;
        keys) found=(@KEYS@) ;;
        keys=)
            found=(@KEYS@)
            found=("${found[@]/%/=}")
            compopt -o nospace
            ;;
    esac
    COMPREPLY=($(compgen -W "${found[*]}" -- "$current"))
}
complete -F _jailmgr jailmgr
